"""Attention of the probe tokens over a prompt's paged KV and over themselves."""

import torch

from metasoft_kernels.backend import uses_triton
from metasoft_kernels.probe import fused, naive
from metasoft_kernels.ragged import single

__all__ = ["attend"]


def attend(
    q: torch.Tensor,
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
    slots: torch.Tensor,
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    scale: float,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    kernels: str = "auto",
    window: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`metasoft_kernels.probe.naive.attend`, or its fused equal; ``kernels`` as in :mod:`.backend`."""
    if not uses_triton(kernels, k_buffer.device, k_buffer.dtype):
        return naive.attend(q, k_buffer, v_buffer, slots, k_new, v_new, scale, k_scale, v_scale, window)
    slots = slots[naive.first_seen(slots.numel(), window) :]
    probe, context = single(q.device, q.shape[0], slots.numel())
    return fused.attend(
        q.contiguous(), k_buffer, v_buffer, slots, k_new, v_new, probe, context, scale, k_scale, v_scale, window
    )
