"""Consolidation in fp32 torch. Keys are never merged: each carries RoPE at its own position."""

import torch

LOAD_EPSILON = 1e-6


def gather(entries: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Pick each head's own entries: ``[S, G, d]`` and ``[G, B]`` give ``[B, G, d]``, dtype kept."""
    return entries.gather(0, indices.t().unsqueeze(-1).expand(-1, -1, entries.shape[-1]))


def attention_flow(
    values: torch.Tensor,
    importance: torch.Tensor,
    kept: torch.Tensor,
    dropped: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
    gate_scale: torch.Tensor | float = 1.0,
) -> torch.Tensor:
    """Move a gated, load-balanced average of the dropped values into the kept ones.

    With W the routing weights, load ``l_j = sum_i W_ij``, the update is
    ``dv_j = sum_i W_ij v_i / (l_j + eps)`` and ``v_j += g_j (dv_j - v_j)``, where
    ``g_j = scale * moved_j / (a_j + moved_j)`` is the share of attention mass that moved,
    ``moved_j = sum_i W_ij a_i``.

    Args:
        values: ``[S, G, d]`` values of the span.
        importance: ``[G, S]`` float32 attention mass a of every entry.
        kept, dropped: ``[G, B]``, ``[G, N]`` int64.
        targets, weights: ``[G, N, m]`` from the routing stage.
        gate_scale: factor on the gate, a number or ``[G, 1]``; the gate is clamped to [0, 1).

    Returns:
        ``[B, G, d]`` float32.
    """
    groups, slots = kept.shape
    d = values.shape[-1]
    by_head = values.float().permute(1, 0, 2)  # [G, S, d]
    heads = torch.arange(groups, device=values.device).unsqueeze(1)
    kept_values = by_head[heads, kept]
    kept_mass = importance.gather(1, kept)
    load = torch.zeros_like(kept_mass)
    moved = torch.zeros_like(kept_mass)
    flow = torch.zeros(groups, slots, d, device=values.device)
    dropped_mass = importance.gather(1, dropped)
    dropped_values = by_head[heads, dropped]
    for rank in range(targets.shape[-1]):
        target, weight = targets[..., rank], weights[..., rank]
        load.scatter_add_(1, target, weight)
        moved.scatter_add_(1, target, weight * dropped_mass)
        flow.scatter_add_(1, target.unsqueeze(-1).expand(-1, -1, d), weight.unsqueeze(-1) * dropped_values)
    flow /= (load + LOAD_EPSILON).unsqueeze(-1)
    gate = gate_scale * moved / (kept_mass + moved).clamp_min(torch.finfo(torch.float32).tiny)
    gate = gate.clamp(0, 1 - torch.finfo(torch.float32).eps).unsqueeze(-1)
    return (kept_values + gate * (flow - kept_values)).permute(1, 0, 2)
