"""Sparse routing in fp32 torch, a block of dropped entries at a time."""

import torch

BLOCK_ROWS = 1024


def route(
    keys: torch.Tensor, kept: torch.Tensor, dropped: torch.Tensor, targets: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Send each dropped entry to the kept entries whose keys it is closest to.

    Affinity is ``k_i · k_j * scale`` with the RoPE'd keys; the best ``targets`` are kept and softmaxed.

    Args:
        keys: ``[S, G, d]`` keys of the span.
        kept: ``[G, B]`` int64.
        dropped: ``[G, N]`` int64.
        targets: m; if B is smaller, B.
        scale: factor on the affinity, usually ``d ** -0.5``.

    Returns:
        ``[G, N, m]`` int64 indices into the kept entries, and ``[G, N, m]`` float32 weights whose rows sum to 1.
    """
    by_head = keys.float().permute(1, 0, 2)  # [G, S, d]
    heads = torch.arange(by_head.shape[0], device=keys.device).unsqueeze(1)
    kept_keys = by_head[heads, kept].transpose(1, 2)  # [G, d, B]
    targets = min(targets, kept.shape[1])
    indices, weights = [], []
    for rows in dropped.split(BLOCK_ROWS, dim=1):
        affinity = by_head[heads, rows] @ kept_keys * scale  # [G, rows, B]
        best = affinity.topk(targets, dim=-1)
        indices.append(best.indices)
        weights.append(best.values.softmax(-1))
    return torch.cat(indices, dim=1), torch.cat(weights, dim=1)
