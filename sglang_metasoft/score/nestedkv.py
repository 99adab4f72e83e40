"""NestedKV (arXiv 2605.26678, read in abstract alone): keys that stand out from global, block and window anchors."""

import torch
from torch.nn.functional import avg_pool1d, normalize

from sglang_metasoft.score.base import Method
from sglang_metasoft.types import LayerView, Scores

BLOCK_TOKENS = 128
WINDOW_TOKENS = 33


class NestedKV(Method):
    """An anchor is the mean direction of keys at one time scale; a key's anomaly is one minus its cosine with it.

    From the abstract: three scales, ranks combined by weights per head and a gate per token. Ours: a scale weighs as
    its anomalies spread; the further a token's best rank lies above its mean rank, the more the best one counts. Sizes
    of block and window are ours too. The paper's budgets differ between heads, which the pool's layout cannot hold.
    Nothing attends, so every entry stands for the same mass.
    """

    default_consolidation = "none"
    needs_probe = False

    def score_layer(self, view: LayerView) -> Scores:
        keys = normalize(view.pool.key[view.job.span_slots].float(), dim=-1).permute(1, 2, 0)  # [G, d, S]
        span = keys.shape[2]
        blocks = avg_pool1d(keys, BLOCK_TOKENS, ceil_mode=True)
        anchors = (
            keys.mean(2, keepdim=True),
            blocks.repeat_interleave(BLOCK_TOKENS, dim=2)[..., :span],
            avg_pool1d(keys, WINDOW_TOKENS, stride=1, padding=WINDOW_TOKENS // 2, count_include_pad=False),
        )
        anomaly = torch.stack([1 - (keys * normalize(anchor, dim=1)).sum(1) for anchor in anchors])  # [3, G, S]
        rank = anomaly.argsort(dim=2, stable=True).argsort(dim=2) / span
        spread = anomaly.std(dim=2, keepdim=True)
        mixed = (rank * spread / spread.sum(0)).sum(0)
        best = rank.amax(0)
        gate = best - rank.mean(0)
        return Scores(mixed + gate * (best - mixed), torch.full_like(mixed, 1 / span))
