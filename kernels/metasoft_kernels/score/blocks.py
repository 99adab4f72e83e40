"""The probe's attention over the span, a block of probe tokens at a time, in fp32 torch."""

import torch

BLOCK_TOKENS = 64


def probability_blocks(
    q: torch.Tensor,
    k_buffer: torch.Tensor,
    slots: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    k_scale: float,
    seen_tokens: int,
):
    """Attention probabilities of every span entry; 0 where it comes after the probe token.

    Args:
        q: ``[t, H, d]`` probe queries after RoPE.
        k_buffer: ``[slots, G, d]`` one layer of the pool.
        slots: ``[S]`` slots of the span.
        lse: ``[t, H]`` log-sum-exp over everything the probe token saw.
        scale: factor on q·k.
        k_scale: what quantized pool entries are multiplied by on reading.
        seen_tokens: span entries that probe token 0 sees before its own; each further one sees one more.

    Yields:
        ``[G, r, n, S]`` float32 for the next n probe tokens.
    """
    t, heads, d = q.shape
    groups = k_buffer.shape[1]
    keys = (k_buffer[slots].float() * k_scale).permute(1, 2, 0).unsqueeze(1)  # [G, 1, d, S]
    entries = torch.arange(slots.numel(), device=q.device)
    for start in range(0, t, BLOCK_TOKENS):
        rows = slice(start, min(start + BLOCK_TOKENS, t))
        queries = q[rows].float().view(-1, groups, heads // groups, d).permute(1, 2, 0, 3) * scale
        norm = lse[rows].view(-1, groups, heads // groups).permute(1, 2, 0).unsqueeze(-1)
        last_seen = seen_tokens + torch.arange(rows.start, rows.stop, device=q.device)
        hidden = entries > last_seen.unsqueeze(1)
        yield (queries @ keys - norm).masked_fill(hidden, float("-inf")).exp()
