"""Probe attention in fp32 torch, a block of probe tokens at a time."""

import torch

BLOCK_TOKENS = 256


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
    window: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from the probe tokens to the prompt and, causally, to the probe tokens before them.

    Args:
        q: ``[t, H, d]`` queries after RoPE.
        k_buffer, v_buffer: ``[slots, G, d]`` one layer of the pool.
        slots: ``[C]`` the prompt's slots, in position order.
        k_new, v_new: ``[t, G, d]`` keys and values of the probe tokens; they are never written to the pool.
        scale: factor on q·k, usually ``d ** -0.5``.
        k_scale, v_scale: what quantized pool entries are multiplied by on reading.
        window: a token sees itself and so many less one before it, probe tokens included; None: all.

    Returns:
        ``[t, H, d]`` attention output in ``q``'s dtype, and ``[t, H]`` float32 log-sum-exp of the scaled logits.
    """
    t, heads, d = q.shape
    groups = k_buffer.shape[1]
    slots = slots[first_seen(slots.numel(), window) :]
    queries = q.float().view(t, groups, heads // groups, d).permute(1, 2, 0, 3) * scale  # [G, r, t, d]
    keys = torch.cat([k_buffer[slots].float() * k_scale, k_new.float()])  # [C + t, G, d]
    values = torch.cat([v_buffer[slots].float() * v_scale, v_new.float()])
    keys, values = keys.permute(1, 2, 0).unsqueeze(1), values.permute(1, 0, 2).unsqueeze(1)
    hidden_from = ~_visible(t, slots.numel(), window, q.device)
    outs, sums = [], []
    for block, hidden in zip(queries.split(BLOCK_TOKENS, dim=2), hidden_from.split(BLOCK_TOKENS), strict=True):
        logits = block @ keys  # [G, r, rows, C + t]
        logits[..., logits.shape[-1] - hidden.shape[-1] :].masked_fill_(hidden, float("-inf"))
        sums.append(logits.logsumexp(-1))
        outs.append((logits - sums[-1].unsqueeze(-1)).exp() @ values)
    out, lse = torch.cat(outs, dim=2), torch.cat(sums, dim=2)
    return out.permute(2, 0, 1, 3).reshape(t, heads, d).to(q.dtype), lse.permute(2, 0, 1).reshape(t, heads)


def first_seen(context: int, window: int | None) -> int:
    """The first of ``context`` entries that a token right after them sees, and no later token one before it."""
    return 0 if window is None else max(0, context - window + 1)


def _visible(tokens: int, context: int, window: int | None, device: torch.device) -> torch.Tensor:
    """``[t, t]`` which probe tokens each one sees; in a window ``[t, C + t]``, the entries before them as well."""
    if window is None:
        return torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
    all_seen = torch.ones(tokens, context + tokens, dtype=torch.bool, device=device)
    return all_seen.tril(context).triu(context - window + 1)
