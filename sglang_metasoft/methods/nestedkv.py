"""NestedKV (arXiv 2605.26678, sections 2.2-2.4): keys that stand out from anchors at three time scales."""

import torch
from torch.nn.functional import avg_pool1d, normalize, pad

from sglang_metasoft.methods.base import Method
from sglang_metasoft.types import LayerView, ModelShape, Scores

LEAST_BLOCK, MOST_BLOCK, BLOCKS = 128, 256, 32
WINDOW_TOKENS = 64
PRIOR = (0.4, 0.4, 0.2)  # global, block, window
SHARPNESS = 3.0  # of the weights per head
EDGE_SHARE = 0.1
GATE_SLOPE, GATE_LEVEL = 10.0, 0.6


class NestedKV(Method):
    """An anchor is the mean direction of keys; a key's anomaly is minus its cosine with it.

    Anchors: of the whole span, of a block, of the window that ends at the key. Each scale's anomalies are scaled to
    [0, 1]; a scale weighs more where its extremes lie further apart; where the scales disagree about a token, the
    strongest alone counts. Of the paper itself only the abstract was at hand, formulas and constants come from what
    others wrote about its appendix. Its budgets differ between heads, which the pool's layout cannot hold.
    Nothing attends, so every entry stands for the same mass.
    """

    default_consolidation = "none"
    needs_probe = False

    def __init__(self, config, shape: ModelShape, embed, device) -> None:
        super().__init__(config, shape, embed, device)
        # Made here: a copy to the device in the midst of a prefill would wait for it.
        self.prior = torch.tensor(PRIOR).log().to(device).view(3, 1, 1)

    def score_layer(self, view: LayerView) -> Scores:
        keys = normalize(view.pool.key[view.job.span_slots].float(), dim=-1).permute(1, 2, 0)  # [G, d, S]
        span = keys.shape[2]
        scales = torch.stack(
            [_unit(-(keys * normalize(anchor, dim=1)).sum(1)) for anchor in anchors(keys)]
        )  # [3, G, S]

        edge = max(1, round(EDGE_SHARE * span))
        ordered = scales.sort(dim=2).values
        gap = ordered[..., -edge:].mean(2, keepdim=True) - ordered[..., :edge].mean(2, keepdim=True)
        mixed = (scales * (self.prior + SHARPNESS * gap).softmax(0)).sum(0)

        surprise = _unit(scales.std(0, correction=0))
        gate = (GATE_SLOPE * (surprise - surprise.mean(1, keepdim=True) - GATE_LEVEL)).sigmoid()
        importance = torch.lerp(mixed, scales.amax(0), gate)
        return Scores(importance, torch.full_like(importance, 1 / span))


def anchors(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean keys of the span ``[G, d, 1]``, of each one's block and of the window up to it, ``[G, d, S]``."""
    span = keys.shape[2]
    block = min(max(LEAST_BLOCK, span // BLOCKS), MOST_BLOCK)
    blocks = avg_pool1d(keys, block, ceil_mode=True).repeat_interleave(block, dim=2)[..., :span]
    # Zeros in front change the length of a mean, not its direction.
    window = avg_pool1d(pad(keys, (WINDOW_TOKENS - 1, 0)), WINDOW_TOKENS, stride=1)
    return keys.mean(2, keepdim=True), blocks, window


def _unit(x: torch.Tensor) -> torch.Tensor:
    """Scale each row to [0, 1]; a constant one to 0."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    return (x - low) / (high - low).clamp_min(torch.finfo(torch.float32).tiny)
