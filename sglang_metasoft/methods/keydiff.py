"""KeyDiff (arXiv 2504.15364, section 3): keys that point away from the others stay; no query is asked."""

import torch
from torch.nn.functional import normalize

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
        importance = -cosine_to_anchor(view.pool.key[view.job.span_slots])
        return Scores(importance, torch.full_like(importance, 1 / importance.shape[1]))


def cosine_to_anchor(keys: torch.Tensor) -> torch.Tensor:
    """Cosine of each key with the mean of all keys scaled to length one.

    Args:
        keys: ``[S, G, d]`` of one layer, of any dtype and scale.

    Returns:
        ``[G, S]`` float32.
    """
    directions = normalize(keys.float(), dim=-1)
    return (directions * normalize(directions.mean(0), dim=-1)).sum(-1).t()
