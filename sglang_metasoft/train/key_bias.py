"""``key_bias`` with gradients: repeats stand back in the ranking, and what stays of a kind carries the rest."""

import torch
from metasoft_kernels.bias.naive import LARGEST_BIAS
from metasoft_kernels.repeats.naive import rank_among_repeats

from sglang_metasoft.train.objective import CUT_FLOOR, log_share_dropped, without_sinks
from sglang_metasoft.train.prepare import SINKS


def favour(log_importance: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
    """As :func:`sglang_metasoft.consolidations.repeats.demote_repeats`, of logs.

    Args:
        log_importance: ``[layers, G, S]``.
        kinds: ``[S]`` int64 from 0 to S - 1, equal for repeats.

    Returns:
        ``[layers, G, S]``.
    """
    largest = log_importance.detach().amax(-1, keepdim=True)
    weights = (log_importance - largest).exp()
    rank = rank_among_repeats(weights.detach().flatten(0, 1), kinds).view_as(weights)
    of_kind = largest + _sum_of_kind(weights, kinds).clamp_min(CUT_FLOOR).log()
    return torch.where(rank == 0, (log_importance + of_kind) / 2, log_importance - (1 + rank).log())


def lost(favoured: torch.Tensor, target: torch.Tensor, ratio: float, kinds: torch.Tensor) -> torch.Tensor:
    """Share of the target's attention to entries of whose kind a soft cut at the ratio leaves nothing.

    Args:
        favoured, target: ``[layers, G, S]``.
    """
    dropped = torch.nn.functional.pad(log_share_dropped(favoured, ratio), (SINKS, 0))
    return (without_sinks(target) * _sum_of_kind(dropped, kinds)[..., SINKS:].exp()).sum(-1).mean()


def carry(log_kept: torch.Tensor, mass: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
    """What a soft cut leaves of each entry, its bias included.

    What fades carries its own attention too, up to LARGEST_BIAS, so that a kind fades as a whole and only far below the
    cut. Charged for all that is below the cut, as the server drops it, answers made compressors worse
    (docs/training.md).

    Args:
        log_kept: ``[layers, G, S]`` log of what the cut alone leaves.
        mass: ``[layers, G, S]`` attention that entries stand for.

    Returns:
        ``[layers, G, S]``, to be added to logits.
    """
    mass = torch.nn.functional.pad(mass[..., SINKS:], (SINKS, 0))
    left = _sum_of_kind(mass * log_kept.exp(), kinds)
    bias = (_sum_of_kind(mass, kinds) / left.clamp_min(CUT_FLOOR)).clamp_min(1).log().clamp_max(LARGEST_BIAS)
    return log_kept + torch.nn.functional.pad(bias[..., SINKS:], (SINKS, 0))


def _sum_of_kind(x: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
    same = kinds.expand_as(x)
    return torch.zeros_like(x).scatter_add(-1, same, x).gather(-1, same)
