"""Attention flow: to which kept entries each dropped one goes."""

import torch

from metasoft_kernels.backend import uses_triton
from metasoft_kernels.ragged import single
from metasoft_kernels.route import fused, naive

__all__ = ["route"]


def route(
    keys: torch.Tensor,
    kept: torch.Tensor,
    dropped: torch.Tensor,
    targets: int,
    scale: float,
    kernels: str = "auto",
    band: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`metasoft_kernels.route.naive.route`, or its fused equal; ``kernels`` as in :mod:`.backend`.

    The fused kernel gives the targets of an entry in no particular order, and a dropped key that is not finite a
    weight of 0.
    """
    if not uses_triton(kernels, keys.device, keys.dtype):
        return naive.route(keys, kept, dropped, targets, scale, band)
    slots = torch.arange(keys.shape[0], device=keys.device)
    kept_axis, dropped_axis = single(keys.device, kept.shape[1], dropped.shape[1])
    dtype = keys.dtype if keys.dtype.itemsize > 1 else torch.bfloat16
    kept_rows, dropped_rows = kept.to(torch.int32).contiguous(), dropped.to(torch.int32).contiguous()
    targets = min(targets, kept.shape[1], band or targets)
    target, weight = fused.route(
        keys, slots, kept_rows, dropped_rows, kept_axis, dropped_axis, targets, scale, dtype, band
    )
    return target.clamp_max(kept.shape[1] - 1).to(torch.int64), weight
