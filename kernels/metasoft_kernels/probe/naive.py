"""Probe attention in fp32 torch."""

import torch


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from the probe tokens to the prompt and, causally, to the probe tokens before them.

    Args:
        q: ``[t, H, d]`` queries after RoPE.
        k_buffer, v_buffer: ``[slots, G, d]`` one layer of the pool.
        slots: ``[C]`` the prompt's slots, in position order.
        k_new, v_new: ``[t, G, d]`` keys and values of the probe tokens; they are never written to the pool.
        scale: factor on q·k, usually ``d ** -0.5``.
        k_scale, v_scale: what quantised pool entries are multiplied by on reading.

    Returns:
        ``[t, H, d]`` attention output in ``q``'s dtype, and ``[t, H]`` float32 log-sum-exp of the scaled logits.
    """
    t, heads, d = q.shape
    groups = k_buffer.shape[1]
    queries = q.float().view(t, groups, heads // groups, d).permute(1, 2, 0, 3) * scale  # [G, r, t, d]
    keys = torch.cat([k_buffer[slots].float() * k_scale, k_new.float()])  # [C + t, G, d]
    values = torch.cat([v_buffer[slots].float() * v_scale, v_new.float()])
    logits = queries @ keys.permute(1, 2, 0).unsqueeze(1)  # [G, r, t, C + t]
    future = torch.ones(t, t, dtype=torch.bool, device=q.device).triu(1)
    logits[..., slots.numel() :].masked_fill_(future, float("-inf"))
    lse = logits.logsumexp(-1)  # [G, r, t]
    out = (logits - lse.unsqueeze(-1)).exp() @ values.permute(1, 0, 2).unsqueeze(1)  # [G, r, t, d]
    return out.permute(2, 0, 1, 3).reshape(t, heads, d).to(q.dtype), lse.permute(2, 0, 1).reshape(t, heads)
