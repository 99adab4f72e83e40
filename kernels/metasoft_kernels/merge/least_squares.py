"""Refitted values (Attention Matching, arXiv 2602.16284, section 3): the probe's output stays, in fp32 torch."""

import torch

RIDGE = 3.0
TINY = torch.finfo(torch.float32).tiny


def least_squares(
    keys: torch.Tensor,
    values: torch.Tensor,
    kept: torch.Tensor,
    q: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    seen_tokens: int,
    sink_tokens: int,
) -> torch.Tensor:
    """Change the kept values so that the span's part of the probe's attention output is nearly what it was.

    With P the probe's attention over the span and ``A = P_kept * sum(P) / sum(P_kept)`` what is left of it, the new
    values solve ``min |A V' - P V|^2 + ridge |V' - V_kept|^2`` by the Cholesky factor of ``A A^T + ridge I``: one row a
    probe token and query head of the group. ``ridge`` is RIDGE times the rows' mean energy, far more than the paper's:
    most queries to come are none of the probe's. The sinks' values stay (their columns count as 0 in the solution, not
    in what is missing): most of a row's mass lies there, and a change of it would reach every query. The paper fits a
    bias per key as well, which makes up for the lost mass; stock kernels have none.

    A head after the other, so that no more than ``[r t, S]`` is in memory.

    Args:
        keys, values: ``[S, G, d]`` of the span.
        kept: ``[G, B]`` int64, ascending.
        q: ``[t, H, d]`` probe queries after RoPE.
        lse: ``[t, H]`` log-sum-exp over all that a probe token sees.
        scale: factor on q·k.
        seen_tokens: span entries that probe token 0 sees before its own; each further one sees one more.
        sink_tokens: the first of the kept entries, whose values stay.

    Returns:
        ``[B, G, d]`` float32.
    """
    span, groups, d = keys.shape
    t, heads, _ = q.shape
    tokens = torch.arange(t, device=q.device).repeat(heads // groups)
    hidden = torch.arange(span, device=q.device) > seen_tokens + tokens.unsqueeze(1)  # [r t, S]
    queries = (q.float() * scale).view(t, groups, -1, d).permute(1, 2, 0, 3).reshape(groups, -1, d)
    norm = lse.view(t, groups, -1).permute(1, 2, 0).reshape(groups, -1, 1)
    refitted = []
    for group in range(groups):
        head_keys, head_values = keys[:, group].float(), values[:, group].float()
        attention = (queries[group] @ head_keys.t()).sub_(norm[group]).masked_fill_(hidden, float("-inf")).exp_()
        left = attention[:, kept[group]]
        left = left * (attention.sum(1, keepdim=True) / left.sum(1, keepdim=True).clamp_min(TINY))
        kept_values = head_values[kept[group]]
        missing = attention @ head_values - left @ kept_values  # [r t, d]
        free = left.clone()
        free[:, :sink_tokens] = 0
        gram = free @ free.t()
        ridge = RIDGE * gram.diagonal().mean() + TINY
        factor = torch.linalg.cholesky_ex(gram + ridge * torch.eye(len(gram), device=q.device)).L
        refitted.append(kept_values + free.t() @ torch.cholesky_solve(missing, factor))
    return torch.stack(refitted, 1)
