"""Each head's kept keys and merged values, into new slots of the pool."""

import torch

from metasoft_kernels.backend import uses_triton
from metasoft_kernels.move import fused, naive
from metasoft_kernels.move.naive import add_to_keys

__all__ = ["add_to_keys", "move"]


def move(
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
    slots: torch.Tensor,
    kept: torch.Tensor,
    new_slots: torch.Tensor,
    values: torch.Tensor | None = None,
    v_scale: float = 1.0,
    kernels: str = "auto",
) -> None:
    """:func:`metasoft_kernels.move.naive.move`, or its fused equal; ``kernels`` as in :mod:`.backend`."""
    if not uses_triton(kernels, k_buffer.device, k_buffer.dtype):
        return naive.move(k_buffer, v_buffer, slots, kept, new_slots, values, v_scale)
    return fused.move(k_buffer, v_buffer, slots, kept.to(torch.int32).contiguous(), new_slots, values, v_scale)
