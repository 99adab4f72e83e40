"""Every kernel of the served path once, before the first prompt: compiled, and the workspace taken from the device."""

import time
from collections.abc import Callable

import torch
from metasoft_kernels.select.fused import BLOCK, SMALLEST_BLOCK

from sglang_metasoft.methods.base import Method
from sglang_metasoft.pipeline.batch import FusedBatch
from sglang_metasoft.pipeline.memory import WORKSPACE_BYTES
from sglang_metasoft.pipeline.probe import make_probe
from sglang_metasoft.types import Job, LayerPool, Plan, Prompt

RATIO = 4


def lengths(method: Method) -> list[tuple[int, int]]:
    """Spans, and the entries they become, that between them meet every variant of the kernels."""
    spans = [SMALLEST_BLOCK]
    while spans[-1] < BLOCK:
        spans.append(2 * spans[-1])
    found = [(span, span // RATIO) for span in spans]
    band = method.config.route_band
    return [*found, (2 * band + 32, band + 16)] if method.consolidation.targets else found


def warm_up(method: Method, attend: Callable, pool: LayerPool, heads: int, dtype: torch.dtype) -> float:
    """Compress prompts of nothing but token 0, one of each of :func:`lengths`; the device is waited for.

    Args:
        attend: the probe's fused attention.
        pool: a layer of the pool; slot 0, which holds no prompt, is read and written.
        heads: query heads of this rank.
        dtype: of the model.

    Returns:
        Seconds.

    Raises:
        Exception: a kernel cannot be compiled or run, or the device lacks the memory.
    """
    began, device = time.perf_counter(), pool.key.device
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    del workspace
    groups, d = pool.key.shape[1:]
    window = method.config.window
    nothing = torch.zeros(max(span for span, _ in lengths(method)) + window, dtype=torch.int64, device=device)
    # All of them first: ranks embed together, and may fail alone afterwards.
    probes = [
        make_probe(method, Prompt(nothing[:span], nothing[:window], span + window, span + window))
        for span, _ in lengths(method)
    ]
    for (span, kept), probe in zip(lengths(method), probes, strict=True):
        slots = nothing[: probe.context_slots]
        sinks = min(method.config.sink, kept)
        batch = FusedBatch(
            [Job(Plan(0, span, kept, sinks), probe, slots, nothing[:span], nothing[:kept])], method, attend
        )
        q, k, v = (
            torch.zeros(probe.embeds.shape[0], number, d, dtype=dtype, device=device)
            for number in (heads, groups, groups)
        )
        _, consolidated, _ = batch.compress(q, k, v, pool, method.gate_scale(0, 0, groups), 0)
        batch.write(pool, consolidated)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
