"""KeyDiff (arXiv 2504.15364, section 3): keys that point away from the others stay; no query is asked."""

import torch
from metasoft_kernels.standing.naive import cosine_to_anchor

from sglang_metasoft.methods.base import Method
from sglang_metasoft.types import LayerView, Scores


class KeyDiff(Method):
    """Importance is minus the cosine between a key and its head's anchor, the mean direction of the span's keys.

    The paper evicts block by block while it reads the prompt; here there is one choice, over the whole span.
    Nothing attends, so every entry stands for the same mass.
    """

    default_consolidation = "none"
    needs_probe = False

    def score_layer(self, view: LayerView) -> Scores:
        importance = -cosine_to_anchor(view.pool.key[view.job.span_slots].transpose(0, 1))
        return Scores(importance, torch.full_like(importance, 1 / importance.shape[1]))
