"""Refitted values (Attention Matching, arXiv 2602.16284, section 3): the probe's output stays, in fp32 torch."""

import torch

from metasoft_kernels.merge.nearest import pick

MAX_TOKENS = 64
RIDGE = 0.01
LEAST_REST = 1e-3


def least_squares(
    keys: torch.Tensor,
    values: torch.Tensor,
    kept: torch.Tensor,
    dropped: torch.Tensor,
    q: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    seen_tokens: int,
) -> torch.Tensor:
    """Change the kept values as little as makes the span's part of the probe's attention output what it was.

    With P the probe's attention over the span and m what it pays to dropped entries, attention over the kept ones
    becomes ``A = P_kept / (1 - m)``. The new values solve ``min |A V' - P V|^2 + ridge |V' - V_kept|^2``, by the
    Cholesky factor of ``A A^T + ridge I``: one row a probe token and query head of the group. The paper fits a bias per
    key as well, which makes up for the lost mass; stock kernels have none.

    Args:
        keys, values: ``[S, G, d]`` of the span.
        kept, dropped: ``[G, B]``, ``[G, N]`` int64.
        q: ``[t, H, d]`` probe queries after RoPE; of more than MAX_TOKENS as many are taken, evenly.
        lse: ``[t, H]`` log-sum-exp over all that a probe token sees.
        scale: factor on q·k.
        seen_tokens: span entries that probe token 0 sees before its own; each further one sees one more.

    Returns:
        ``[B, G, d]`` float32.
    """
    groups, span = keys.shape[1], keys.shape[0]
    t, heads, d = q.shape
    stride = -(-t // MAX_TOKENS)
    tokens = torch.arange((t - 1) % stride, t, stride, device=q.device)
    rows = heads // groups * tokens.numel()
    queries = q[tokens].float().view(-1, groups, heads // groups, d).permute(1, 2, 0, 3) * scale  # [G, r, n, d]
    logits = queries @ keys.float().permute(1, 2, 0).unsqueeze(1)  # [G, r, n, S]
    norm = lse[tokens].view(-1, groups, heads // groups).permute(1, 2, 0)
    hidden = torch.arange(span, device=q.device) > seen_tokens + tokens.unsqueeze(1)  # [n, S]
    attention = (logits - norm.unsqueeze(-1)).masked_fill(hidden, float("-inf")).exp().view(groups, rows, span)
    lost = attention.gather(2, dropped.unsqueeze(1).expand(-1, rows, -1)).sum(-1, keepdim=True)
    attention_kept = attention.gather(2, kept.unsqueeze(1).expand(-1, rows, -1)) / (1 - lost).clamp_min(LEAST_REST)
    kept_values = pick(values, kept)
    missing = attention @ values.float().permute(1, 0, 2) - attention_kept @ kept_values  # [G, rows, d]
    gram = attention_kept @ attention_kept.transpose(1, 2)
    diagonal = gram.diagonal(dim1=1, dim2=2)
    ridge = RIDGE * diagonal.mean(-1, keepdim=True) + torch.finfo(torch.float32).tiny
    factor = torch.linalg.cholesky_ex(gram + torch.diag_embed(ridge.expand_as(diagonal))).L
    change = attention_kept.transpose(1, 2) @ torch.cholesky_solve(missing, factor)
    return (kept_values + change).permute(1, 0, 2)
