"""Importance in fp32 torch."""

import torch


def importance(
    q: torch.Tensor,
    k_buffer: torch.Tensor,
    slots: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    k_scale: float = 1.0,
) -> torch.Tensor:
    """Attention probability of every entry, averaged over the probe tokens and the query heads of its group.

    Args:
        q: ``[t, H, d]`` probe queries after RoPE.
        k_buffer: ``[slots, G, d]`` one layer of the pool.
        slots: ``[S]`` slots of the span.
        lse: ``[t, H]`` log-sum-exp over everything the probe token saw, from the probe attention.
        scale: factor on q·k.
        k_scale: what quantized pool entries are multiplied by on reading.

    Returns:
        ``[G, S]`` float32.
    """
    t, heads, d = q.shape
    groups = k_buffer.shape[1]
    queries = q.float().view(t, groups, heads // groups, d).permute(1, 2, 0, 3) * scale  # [G, r, t, d]
    keys = k_buffer[slots].float() * k_scale  # [S, G, d]
    logits = queries @ keys.permute(1, 2, 0).unsqueeze(1)  # [G, r, t, S]
    norm = lse.view(t, groups, heads // groups).permute(1, 2, 0)
    return (logits - norm.unsqueeze(-1)).exp().mean(dim=(1, 2))
