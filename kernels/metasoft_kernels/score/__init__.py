"""Importance of each span entry: the attention that the probe tokens pay it."""

import torch

from metasoft_kernels.backend import uses_triton
from metasoft_kernels.ragged import single
from metasoft_kernels.score import fused, naive
from metasoft_kernels.score.blocks import probability_blocks

__all__ = ["importance", "probability_blocks"]


def importance(
    q: torch.Tensor,
    k_buffer: torch.Tensor,
    slots: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    k_scale: float = 1.0,
    kernels: str = "auto",
) -> torch.Tensor:
    """:func:`metasoft_kernels.score.naive.importance`, or its fused equal; ``kernels`` as in :mod:`.backend`."""
    if not uses_triton(kernels, k_buffer.device, k_buffer.dtype):
        return naive.importance(q, k_buffer, slots, lse, scale, k_scale)
    probe, span = single(q.device, q.shape[0], slots.numel())
    return fused.importance(q.contiguous(), k_buffer, slots, lse.contiguous(), probe, span, scale, k_scale)
