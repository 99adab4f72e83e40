"""ChunkKV (arXiv 2502.00299, section 3): whole chunks of neighbouring tokens stay or go, for all heads alike."""

import torch

from sglang_metasoft.methods.base import Method
from sglang_metasoft.types import Scores

CHUNK_TOKENS = 20


class ChunkKV(Method):
    """The window's attention, summed over heads and averaged over chunks, ranks the chunks.

    The chunk in which the budget runs out gives its first tokens, so that B is exact; sinks come on top of the ranking.
    The paper's reuse of one layer's choice by the next is left out: it saves time, not memory.
    """

    default_consolidation = "none"
    needs_all_heads = True

    def score(self, q, k_buffer, span_slots, lse, scale, k_scale) -> Scores:
        mass = super().score(q, k_buffer, span_slots, lse, scale, k_scale).importance  # [G, S]
        span = mass.shape[1]
        chunk = torch.arange(span, device=mass.device) // CHUNK_TOKENS
        number = -(-span // CHUNK_TOKENS)
        sums = mass.new_zeros(number).index_add_(0, chunk, mass.sum(0))
        means = sums / mass.new_zeros(number).index_add_(0, chunk, torch.ones_like(mass[0]))
        ranking = means.nan_to_num().argsort(descending=True, stable=True).argsort()
        order = ranking[chunk] * CHUNK_TOKENS + torch.arange(span, device=mass.device) % CHUNK_TOKENS
        return Scores((span + CHUNK_TOKENS - order).float().expand_as(mass), mass)
