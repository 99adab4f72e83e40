"""StreamingLLM (arXiv 2309.17453, section 3.2): the attention sinks and the most recent entries stay."""

import torch

from sglang_metasoft.methods.base import Method
from sglang_metasoft.types import LayerView, Scores


class StreamingLLM(Method):
    """Recency is importance; the sinks are those that every method keeps.

    The paper numbers positions inside its cache; here an entry keeps the position that its RoPE was computed with.
    Nothing attends, so every entry stands for the same mass.
    """

    default_consolidation = "none"
    needs_probe = False

    def score_layer(self, view: LayerView) -> Scores:
        groups, span = view.pool.key.shape[1], view.job.span_slots.numel()
        recency = torch.arange(span, device=view.pool.key.device, dtype=torch.float32).expand(groups, span)
        return Scores(recency, torch.full_like(recency, 1 / span))
