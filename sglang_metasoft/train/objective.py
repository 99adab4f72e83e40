"""What training minimises: how far the probe's view of a context is from what answers will look at."""

from typing import NamedTuple

import torch

from sglang_metasoft.train.prepare import SINKS

SOFTNESS = 0.5  # of the cut at the budget, in units of log importance
CUT_FLOOR = 1e-12
MAP_LOSSES = ("kl", "squared")


class Losses(NamedTuple):
    """Means over layers and KV heads, each a scalar with gradient."""

    divergence: torch.Tensor  # of the importance from the target, both without sinks: KL, or relative squared error
    lost: torch.Tensor  # share of the target's attention that a cut at the budget drops


def without_sinks(target: torch.Tensor) -> torch.Tensor:
    """``[..., S - sinks]``, each row scaled to sum to one."""
    rest = target[..., SINKS:]
    return rest / rest.sum(-1, keepdim=True).clamp_min(CUT_FLOOR)


def losses(log_importance: torch.Tensor, target: torch.Tensor, ratio: float, map_loss: str = "kl") -> Losses:
    """Compare a ranking with the attention that it is to save.

    Args:
        log_importance: ``[layers, G, S]``, up to a constant a head.
        target: ``[layers, G, S]``.
        ratio: span tokens per kept entry of the soft cut.
        map_loss: one of :data:`MAP_LOSSES`. The squared error, the paper's, is told as a share of the target's square,
            so that its scale does not fall with the length of the prompt.
    """
    wanted = without_sinks(target)
    scores = log_importance[..., SINKS:]
    if map_loss == "squared":
        errors = (scores.softmax(-1) - wanted).square().sum(-1)
        divergence = (errors / wanted.square().sum(-1).clamp_min(CUT_FLOOR)).mean()
    else:
        divergence = (wanted * (wanted.clamp_min(CUT_FLOOR).log() - scores.log_softmax(-1))).sum(-1).mean()
    lost = (wanted * log_share_dropped(log_importance, ratio).exp()).sum(-1).mean()
    return Losses(divergence, lost)


def log_keep(log_importance: torch.Tensor, kept: int) -> torch.Tensor:
    """``[layers, G, S]``: log of how much of each entry a soft cut after ``kept`` entries leaves; 0 for sinks."""
    scores = log_importance[..., SINKS:]
    return torch.nn.functional.pad(torch.nn.functional.logsigmoid(_above_cut(scores, kept - SINKS)), (SINKS, 0))


def log_share_dropped(log_importance: torch.Tensor, ratio: float) -> torch.Tensor:
    """``[layers, G, S - sinks]``: log of how much of each entry a soft cut at the ratio drops."""
    scores = log_importance[..., SINKS:]
    return torch.nn.functional.logsigmoid(-_above_cut(scores, scores.shape[-1] / ratio))


def _above_cut(scores: torch.Tensor, kept: float) -> torch.Tensor:
    kept = min(max(1, round(kept)), scores.shape[-1])
    cut = scores.kthvalue(scores.shape[-1] - kept + 1, dim=-1, keepdim=True).values
    return (scores - cut) / SOFTNESS


def answer_divergence(full: torch.Tensor, compressed: torch.Tensor) -> torch.Tensor:
    """KL between the next-token distributions ``[t, vocab]`` (logits) over the full and the compressed context."""
    wanted = full.float().log_softmax(-1)
    return (wanted.exp() * (wanted - compressed.float().log_softmax(-1))).sum(-1).mean()


def orthogonality(library: torch.Tensor) -> torch.Tensor:
    """``||L L^T - I||_F^2`` of a library ``[M, D]``."""
    gram = library @ library.t()
    return (gram - torch.eye(len(gram), device=gram.device)).square().sum()
