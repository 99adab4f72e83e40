"""The entries that stay: top-B per KV head, sinks forced."""

import torch

from metasoft_kernels.backend import uses_triton
from metasoft_kernels.ragged import single
from metasoft_kernels.select import fused, naive

__all__ = ["split_top"]


def split_top(
    importance: torch.Tensor, kept_slots: int, sink_tokens: int, kernels: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`metasoft_kernels.select.naive.split_top`, or its fused equal; ``kernels`` as in :mod:`.backend`."""
    if not uses_triton(kernels, importance.device, importance.dtype):
        return naive.split_top(importance, kept_slots, sink_tokens)
    entries = importance.shape[1]
    axes = single(importance.device, entries, kept_slots, entries - kept_slots)
    sinks = torch.full((1,), sink_tokens, dtype=torch.int32, device=importance.device)
    kept, dropped = fused.split_top(importance.contiguous(), sinks, *axes)
    return kept.to(torch.int64), dropped.to(torch.int64)
