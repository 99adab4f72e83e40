"""Consolidation: the values of dropped entries flow into the kept ones."""

import torch

from metasoft_kernels.backend import uses_triton
from metasoft_kernels.merge import fused, naive
from metasoft_kernels.merge.naive import gather
from metasoft_kernels.ragged import single

__all__ = ["attention_flow", "gather"]


def attention_flow(
    values: torch.Tensor,
    importance: torch.Tensor,
    kept: torch.Tensor,
    dropped: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
    gate_scale: torch.Tensor | float = 1.0,
    kernels: str = "auto",
) -> torch.Tensor:
    """:func:`metasoft_kernels.merge.naive.attention_flow`, or its fused equal; ``kernels`` as in :mod:`.backend`."""
    if not uses_triton(kernels, values.device, values.dtype):
        return naive.attention_flow(values, importance, kept, dropped, targets, weights, gate_scale)
    slots = torch.arange(values.shape[0], device=values.device)
    (kept_axis,) = single(values.device, kept.shape[1])
    kept, dropped, targets = (part.to(torch.int32).contiguous() for part in (kept, dropped, targets))
    merged, is_finite = fused.attention_flow(
        values, slots, importance.contiguous(), kept, dropped, targets, weights.contiguous(), kept_axis,
        gate_of_heads(gate_scale, values.shape[1], values.device), 1.0, torch.float32,
    )  # fmt: skip
    return merged.masked_fill_(~is_finite.t().unsqueeze(-1), float("nan"))


def gate_of_heads(gate_scale: torch.Tensor | float, groups: int, device: torch.device) -> torch.Tensor:
    """A gate scale, a number or ``[G, 1]``, as ``[G]`` float32."""
    if isinstance(gate_scale, torch.Tensor):
        return gate_scale.to(torch.float32).expand(groups, 1).flatten().contiguous()
    return torch.full((groups,), float(gate_scale), dtype=torch.float32, device=device)
