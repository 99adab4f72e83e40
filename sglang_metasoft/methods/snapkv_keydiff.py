"""SnapKV and KeyDiff together (this project's; arXiv 2404.14469 and 2504.15364): each keeps its own best entries."""

import torch

from sglang_metasoft.methods.keydiff import cosine_to_anchor
from sglang_metasoft.methods.snapkv import SnapKV
from sglang_metasoft.types import LayerView, Scores

UNLIKE_FOR_ONE = 3  # entries kept for their unlike keys, for one that is kept for the window's attention


class SnapKVKeyDiff(SnapKV):
    """An entry counts for the better of two ranks: by the window's attention, and by how unlike all others its key is.

    A quarter of the budget goes to what the prompt's end looks at, three quarters to what stands out, whoever may ask
    for it; what is in both lists leaves room for more of each. An entry stands for the window's attention.
    """

    def score_layer(self, view: LayerView) -> Scores:
        attention = super().score_layer(view).importance
        unlike = -cosine_to_anchor(view.pool.key[view.job.span_slots])
        return Scores(torch.maximum(1 - UNLIKE_FOR_ONE * (1 - ranks(attention)), ranks(unlike)), attention)


def ranks(values: torch.Tensor) -> torch.Tensor:
    """``[G, S]`` to float32 ranks above 0, for the smallest of a row, to 1; equal values in order."""
    order = values.argsort(dim=1, stable=True)
    places = torch.arange(1, values.shape[1] + 1, dtype=torch.float32, device=values.device).expand_as(values)
    return torch.empty_like(places).scatter_(1, order, places) / values.shape[1]
