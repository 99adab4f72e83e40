"""A prompt's entries through the server's own stages: its cache stands in for the pool."""

import torch

from sglang_metasoft.hf.model import HFModel, LayerKV
from sglang_metasoft.hf.shape import context_tokens
from sglang_metasoft.methods.base import Method
from sglang_metasoft.pipeline.layer import compress_layer
from sglang_metasoft.pipeline.probe import make_probe
from sglang_metasoft.types import Job, LayerPool, MergedKV, Plan, Probe, Prompt, Routes


def probe_of(model: HFModel, ids: list[int], plan: Plan, method: Method) -> Probe:
    """The probe of a prompt's span; what follows a boundary is not known."""
    tokens = plan.end_slots if plan.ends_at_boundary else len(ids)
    all_ids = model.tensor(ids)
    span, tail = all_ids[plan.start_slots : plan.end_slots], all_ids[plan.end_slots : tokens]
    return make_probe(method, Prompt(span, tail, context_slots=tokens, context_tokens=tokens))


@torch.no_grad()
def compress(
    model: HFModel, entries: list[LayerKV], probe: Probe, plans: list[Plan], method: Method
) -> list[list[tuple[Routes, MergedKV]]]:
    """Probe a prompt once and compress its span as each plan says; all plans have the same span.

    Args:
        entries: of the whole prompt, in all layers; only read.

    Returns:
        For each plan and layer the routes and the consolidated entries ``[B, G, d]``.

    Raises:
        ValueError: a layer's attention is not plain causal attention.
    """
    slots = torch.arange(entries[0].key.shape[0], device=model.device)
    seen, span = slots[: probe.context_slots], slots[plans[0].start_slots : plans[0].end_slots]
    jobs = [Job(plan, probe, seen, span, slots[: plan.kept_slots]) for plan in plans]
    results: list[list[tuple[Routes, MergedKV]]] = [[] for _ in plans]

    def attend(layer, q, k, v, scale):
        pool = LayerPool(entries[layer].key, entries[layer].value, scale, 1.0, 1.0, model.windows[layer])
        q, k, v = (tensor[0].transpose(0, 1).contiguous() for tensor in (q, k, v))
        gate = method.gate_scale(layer, 0, model.shape.num_kv_heads)
        for job, result in zip(jobs, results, strict=True):
            out, routes, merged, _ = compress_layer(job, q, k, v, pool, method, gate, layer)
            result.append((routes, merged))
        return out.transpose(0, 1)[None]

    tokens = probe.embeds.shape[0]
    start, limit = probe.first_position, context_tokens(model.config)
    if limit is not None:  # near the longest text the probe slides back onto the last positions, as in the server
        start = max(0, min(start, limit - tokens))
    model.run(probe.embeds[None], torch.arange(start, start + tokens, device=model.device)[None], attend)
    return results
