"""K, V, Routes -> MergedKV: the consolidated entries of one layer."""

import torch
from metasoft_kernels.merge import attention_flow, gather

from sglang_metasoft.types import MergedKV, Routes, Scores


def consolidate(
    keys: torch.Tensor,
    values: torch.Tensor,
    scores: Scores,
    routes: Routes,
    gate_scale: torch.Tensor | float,
    kernels: str = "auto",
) -> MergedKV:
    """Gather each head's kept keys, and its kept values with what flowed into them.

    Args:
        keys, values: ``[S, G, d]`` of the span.
        scores: importance ``[G, S]``.
        routes: with no targets the values stay as they are.
        gate_scale: factor on the gate, a number or ``[G, 1]``.
        kernels: the setting.

    Returns:
        ``[B, G, d]`` keys and values in the dtype of the input.
    """
    kept_keys = gather(keys, routes.kept)
    if routes.targets.shape[-1] == 0:
        return MergedKV(kept_keys, gather(values, routes.kept))
    return MergedKV(kept_keys, attention_flow(values, scores.importance, *routes, gate_scale, kernels).to(values.dtype))
