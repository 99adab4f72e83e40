"""The stages of one layer, in order: probe -> score -> route -> merge. Tensors in, tensors out."""

import torch
from metasoft_kernels.probe import attend

from sglang_metasoft.config import MetaSoftConfig
from sglang_metasoft.merge import consolidate
from sglang_metasoft.route import choose_routes
from sglang_metasoft.score.base import Method
from sglang_metasoft.types import Job, LayerPool, MergedKV, Routes


def compress_layer(
    job: Job,
    q: torch.Tensor,
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    pool: LayerPool,
    method: Method,
    config: MetaSoftConfig,
    gate_scale: torch.Tensor | float,
) -> tuple[torch.Tensor, Routes, MergedKV]:
    """Probe one layer of one request's KV and consolidate its span.

    Args:
        job: where the entries lie.
        q: ``[t, H, d]`` queries of the probe tokens after RoPE.
        k_new, v_new: ``[t, G, d]`` their keys and values.
        pool: the layer's buffers; only read.
        gate_scale: the method's factor on the gate for this layer's heads.

    Returns:
        The probe tokens' attention output ``[t, H, d]``, the routes, and the entries to write.
    """
    out, lse = attend(
        q, pool.key, pool.value, job.context_slots, k_new, v_new, pool.scale, pool.key_scale, pool.value_scale
    )
    scores = method.score(q, pool.key, job.span_slots, lse, pool.scale, pool.key_scale)
    keys = _read(pool.key, job.span_slots, pool.key_scale, q.dtype)
    values = _read(pool.value, job.span_slots, pool.value_scale, q.dtype)
    consolidation = config.consolidation or method.default_consolidation
    targets = config.route_targets if consolidation == "attention_flow" else 0
    routes = choose_routes(job.plan, scores, keys, targets, pool.scale)
    return out, routes, consolidate(keys, values, scores, routes, gate_scale)


def _read(buffer: torch.Tensor, slots: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    entries = buffer[slots]
    return entries if entries.dtype == dtype else entries.to(dtype) * scale
