"""SnapKV (arXiv 2404.14469, section 4): the prompt's own last window observes the rest of it."""

import torch
from torch.nn.functional import avg_pool1d

from sglang_metasoft.methods.base import Method
from sglang_metasoft.types import Scores


class SnapKV(Method):
    """The window's tokens are run once more over the KV before them; importance is pooled over neighbours.

    At a boundary there is no tail: the span's own last tokens are the window, so that the choice is the same whatever
    follows. They take part in it like all others.
    """

    default_consolidation = "none"

    def score(self, q, k_buffer, span_slots, lse, scale, k_scale) -> Scores:
        raw = super().score(q, k_buffer, span_slots, lse, scale, k_scale).importance
        return Scores(_pool(raw, self.config.pool_kernel))


def _pool(importance: torch.Tensor, kernel: int) -> torch.Tensor:
    return avg_pool1d(importance, kernel_size=kernel, stride=1, padding=kernel // 2)
