"""The stages of one layer, in order: probe -> score -> route -> merge. Tensors in, tensors out."""

import torch
from metasoft_kernels.merge import gather
from metasoft_kernels.probe import attend

from sglang_metasoft.consolidations.base import as_they_were
from sglang_metasoft.methods.base import Method
from sglang_metasoft.pipeline.clock import Clock, no_clock
from sglang_metasoft.pipeline.route import choose_routes
from sglang_metasoft.types import Job, LayerPool, LayerView, MergedKV, Routes, Scores


def compress_layer(
    job: Job,
    q: torch.Tensor,
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    pool: LayerPool,
    method: Method,
    gate_scale: torch.Tensor | float,
    layer: int = 0,
    first_kv_head: int = 0,
    clock: Clock = no_clock,
) -> tuple[torch.Tensor, Routes, MergedKV, torch.Tensor]:
    """Probe one layer of one request's KV and consolidate its span.

    What is not finite does no harm: such importance counts as none, such a merged value stays as it was.

    Args:
        job: where the entries lie.
        q: ``[t, H, d]`` queries of the probe tokens after RoPE; t may be 0.
        k_new, v_new: ``[t, G, d]`` their keys and values.
        pool: the layer's buffers; only read.
        method: with its settings and its consolidation.
        gate_scale: the method's factor on the gate for this layer's heads.
        layer: its number in the model.
        first_kv_head: number in the model of this rank's first KV head.
        clock: around each stage.

    Returns:
        The probe tokens' attention output ``[t, H, d]``, the routes, the entries to write, and whether everything
        was finite: a bool tensor on the device, for callers that can read it without waiting.
    """
    config, consolidation = method.config, method.consolidation
    with clock("probe"):
        if q.shape[0]:
            out, lse = attend(
                q, pool.key, pool.value, job.context_slots, k_new, v_new, pool.scale, pool.key_scale, pool.value_scale,
                config.kernels, pool.window_tokens,
            )  # fmt: skip
        else:
            out, lse = q, q.new_empty(q.shape[:2], dtype=torch.float32)
    if pool.window_tokens is not None:
        return out, *keep_last(job, pool, q.dtype)
    with clock("score"):
        view = LayerView(job, pool, q, lse, layer, first_kv_head)
        ranking = job.probe.ranking_tokens
        raw = method.score_layer(view._replace(q=q[:ranking], lse=lse[:ranking]))
        raw_mass = raw.importance if raw.mass is None else raw.mass
        finite_scores = raw.importance.isfinite().all() & raw_mass.isfinite().all()
        importance = consolidation.rank(raw.importance.nan_to_num(0.0, 0.0, 0.0), job.probe)
        scores = Scores(importance, raw_mass.nan_to_num(0.0, 0.0, 0.0))
    with clock("route"):
        keys = _read(pool.key, job.span_slots, pool.key_scale, q.dtype)
        values = _read(pool.value, job.span_slots, pool.value_scale, q.dtype)
        routes = choose_routes(
            job.plan, scores, keys, consolidation.targets, pool.scale, config.kernels, config.route_band
        )
    with clock("merge"):
        if routes.dropped.shape[1] == 0:
            merged = as_they_were(keys, values, routes)
        else:
            merged = consolidation.merge(view, keys, values, scores, routes, gate_scale)
    finite_values = merged.value.isfinite()
    is_finite = finite_scores & merged.key.isfinite().all() & finite_values.all()
    merged = merged._replace(value=torch.where(finite_values, merged.value, gather(values, routes.kept)))
    return out, routes, merged, is_finite


def keep_last(job: Job, pool: LayerPool, dtype: torch.dtype) -> tuple[Routes, MergedKV, torch.Tensor]:
    """A layer of a window: in every head the last entries of the span stay as they were, in order.

    No later token sees any other, and those that follow lie as many entries behind a kept one as tokens.

    Returns:
        As :func:`compress_layer`, without the probe's output.
    """
    groups, dropped = pool.key.shape[1], job.plan.saved_slots
    rows = torch.arange(job.plan.span_tokens, device=job.span_slots.device).expand(groups, -1)
    nowhere = rows[:, :dropped, None][..., :0]
    routes = Routes(rows[:, dropped:], rows[:, :dropped], nowhere, nowhere.float())
    slots = job.span_slots[dropped:]
    merged = MergedKV(_read(pool.key, slots, pool.key_scale, dtype), _read(pool.value, slots, pool.value_scale, dtype))
    return routes, merged, torch.ones((), dtype=torch.bool, device=slots.device)


def _read(buffer: torch.Tensor, slots: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    entries = buffer[slots]
    return entries if entries.dtype == dtype else entries.to(dtype) * scale
