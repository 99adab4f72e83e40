"""Sparse routing in fp32 torch, a block of dropped entries at a time."""

import torch

BLOCK_ROWS = 1024


def nearest(kept: torch.Tensor, dropped: torch.Tensor, band: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the ``band`` kept entries nearest to each dropped one begin and end, as many before it as after it.

    Args:
        kept: ``[G, B]`` int64, ascending.
        dropped: ``[G, N]`` int64, ascending.
        band: entries; near either end of the span the same number lies more to one side.

    Returns:
        Two ``[G, N]`` int64 positions among the kept entries; the second is not included.
    """
    slots = kept.shape[1]
    before = torch.searchsorted(kept.contiguous(), dropped.contiguous())
    first = (before - band // 2).clamp(0, max(slots - band, 0))
    return first, (first + band).clamp_max(slots)


def route(
    keys: torch.Tensor, kept: torch.Tensor, dropped: torch.Tensor, targets: int, scale: float, band: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Send each dropped entry to the kept entries whose keys it is closest to.

    Affinity is ``k_i · k_j * scale`` with the RoPE'd keys; the best ``targets`` are kept and softmaxed.

    Args:
        keys: ``[S, G, d]`` keys of the span.
        kept: ``[G, B]`` int64, ascending.
        dropped: ``[G, N]`` int64, ascending.
        targets: m; if B or the band is smaller, that.
        scale: factor on the affinity, usually ``d ** -0.5``.
        band: how many kept entries, the nearest in position (:func:`nearest`), may be a dropped entry's targets; None:
            all of them.

    Returns:
        ``[G, N, m]`` int64 indices into the kept entries, and ``[G, N, m]`` float32 weights whose rows sum to 1.
    """
    by_head = keys.float().permute(1, 0, 2)  # [G, S, d]
    heads = torch.arange(by_head.shape[0], device=keys.device).unsqueeze(1)
    kept_keys = by_head[heads, kept].transpose(1, 2)  # [G, d, B]
    slots = kept.shape[1]
    band = min(band or slots, slots)
    targets = min(targets, band)
    indices, weights = [], []
    for rows in dropped.split(BLOCK_ROWS, dim=1):
        affinity = by_head[heads, rows] @ kept_keys * scale  # [G, rows, B]
        if band < slots:
            first, end = (bound.unsqueeze(-1) for bound in nearest(kept, rows, band))
            position = torch.arange(slots, device=keys.device)
            affinity = affinity.masked_fill((position < first) | (position >= end), float("-inf"))
        best = affinity.topk(targets, dim=-1)
        indices.append(best.indices)
        weights.append(best.values.softmax(-1))
    return torch.cat(indices, dim=1), torch.cat(weights, dim=1)
