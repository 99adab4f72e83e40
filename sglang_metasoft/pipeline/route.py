"""Scores -> Routes: which entries stay, and to which of them each dropped one flows."""

import torch
from metasoft_kernels.route import route as route_dropped
from metasoft_kernels.select import split_top

from sglang_metasoft.types import Plan, Routes, Scores


def choose_routes(
    plan: Plan,
    scores: Scores,
    keys: torch.Tensor,
    targets: int,
    scale: float,
    kernels: str = "auto",
    band: int | None = None,
) -> Routes:
    """Keep the top-B entries per KV head and route the others.

    Args:
        plan: how many stay, and the sinks.
        scores: importance ``[G, S]``.
        keys: ``[S, G, d]`` keys of the span, RoPE included.
        targets: m, kept entries per dropped one; 0 routes nothing.
        scale: factor on k·k.
        kernels: the setting.
        band: kept entries, the nearest in position, among which a dropped one finds its targets; None: all.
    """
    kept, dropped = split_top(scores.importance, plan.kept_slots, plan.sink_tokens, kernels)
    if targets == 0 or dropped.shape[1] == 0:
        nowhere = dropped.new_empty(*dropped.shape, 0)
        return Routes(kept, dropped, nowhere, nowhere.float())
    return Routes(kept, dropped, *route_dropped(keys, kept, dropped, targets, scale, kernels, band))
