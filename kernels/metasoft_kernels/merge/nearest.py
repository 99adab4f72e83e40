"""The most similar of some entries, in fp32 torch, a block of rows at a time."""

import torch

BLOCK_ROWS = 1024


def nearest(rows: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each row the largest dot product with a column, and which column that is.

    Args:
        rows: ``[G, N, d]`` float32.
        columns: ``[G, B, d]`` float32.

    Returns:
        ``[G, N]`` float32 and ``[G, N]`` int64; of equal columns any.
    """
    best = [(block @ columns.transpose(1, 2)).max(dim=-1) for block in rows.split(BLOCK_ROWS, dim=1)]
    return torch.cat([block.values for block in best], 1), torch.cat([block.indices for block in best], 1)


def pick(entries: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Each head's own entries: ``[S, G, d]`` and ``[G, B]`` give ``[G, B, d]`` float32."""
    heads = torch.arange(indices.shape[0], device=entries.device).unsqueeze(1)
    return entries.permute(1, 0, 2)[heads, indices].float()


def add_to(targets: torch.Tensor, rows: torch.Tensor, count: int) -> torch.Tensor:
    """Sum ``[G, N, d]`` rows by their ``[G, N]`` targets into ``[G, count, d]``."""
    total = rows.new_zeros(rows.shape[0], count, rows.shape[-1])
    return total.scatter_add_(1, targets.unsqueeze(-1).expand_as(rows), rows)
