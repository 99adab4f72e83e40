"""Selection by a stable sort; no host synchronisation."""

import torch


def split_top(importance: torch.Tensor, kept_slots: int, sink_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Split the span into kept and dropped entries, per KV head.

    Args:
        importance: ``[G, S]`` float32. NaN ranks lowest; of equal entries the earlier one ranks higher.
        kept_slots: B, entries to keep.
        sink_tokens: first entries that are kept whatever their importance; at most B.

    Returns:
        ``[G, B]`` kept and ``[G, S - B]`` dropped indices, int64, each ascending.
    """
    ranked = importance.nan_to_num(nan=float("-inf"))
    ranked = torch.cat([torch.full_like(ranked[:, :sink_tokens], float("inf")), ranked[:, sink_tokens:]], dim=1)
    order = ranked.sort(dim=1, descending=True, stable=True).indices
    return order[:, :kept_slots].sort(dim=1).values, order[:, kept_slots:].sort(dim=1).values
