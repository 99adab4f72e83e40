"""All stages together: a ragged batch by fused kernels gives what torch gives job by job, pool included."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from metasoft_kernels.probe import fused as probe_kernels

from sglang_metasoft.compressor.entry_scorer import EntryScorer
from sglang_metasoft.config import CONSOLIDATIONS, MetaSoftConfig
from sglang_metasoft.consolidations import load_consolidation
from sglang_metasoft.consolidations.key_bias import KeyBiasInputs
from sglang_metasoft.consolidations.repeats import Repeats
from sglang_metasoft.methods import load_method
from sglang_metasoft.pipeline import memory
from sglang_metasoft.pipeline.batch import FusedBatch
from sglang_metasoft.pipeline.layer import compress_layer
from sglang_metasoft.types import Job, LayerPool, Plan, Probe
from tests.kernels.cases import DEVICE, Case, make_pool, randn

SPANS, KEPT, WINDOW = [150, 64, 97], [40, 16, 97], 10


def make_method(name, consolidation, kernels):
    """As far as a layer needs it: neither has probe tokens to load."""
    method = load_method(name).__new__(load_method(name))
    method.config = MetaSoftConfig(consolidation=consolidation, kernels=kernels, route_targets=3, route_band=30)
    method.shape, method.device = None, DEVICE
    if name == "metasoft":
        method.soft_tokens = SimpleNamespace(scorer=make_scorer())
    return method


def make_scorer() -> EntryScorer:
    """The same one for each call; its opinion weighs as much as the probe's."""
    scorer, generator = EntryScorer(1, 3, 64, 16), torch.Generator().manual_seed(11)
    for parameter in scorer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(DEVICE) / 5
    return scorer.requires_grad_(False)


def make_jobs(case, pool, biases_keys):
    """Three requests; the last keeps everything."""
    jobs, begin, new = [], 0, 0
    for span, kept in zip(SPANS, KEPT, strict=True):
        slots = pool.slots[begin : begin + span + WINDOW]
        plan = Plan(0, span, kept, 2, ends_at_boundary=span == 64)
        probe = Probe(torch.empty(9 if span == 64 else 12, 1), slots.numel(), slots.numel())
        if biases_keys:
            ids = torch.arange(span, device=DEVICE) // 2 % 20
            probe = probe._replace(consolidation_inputs=KeyBiasInputs(Repeats(ids), randn(1, 3, 64)))
        jobs.append(Job(plan, probe, slots, slots[:span], pool.free[new : new + kept]))
        begin, new = begin + span + WINDOW, new + kept
    return jobs


FUSED = [name for name in CONSOLIDATIONS if load_consolidation(name).is_fused]
# The probe's attention alone, and a score of its own.
PAIRS = [*itertools.product(["judge_q", "snapkv"], FUSED)]
# An entry scorer, which has kernels with biased keys alone, and a score that has kernels.
PAIRS += itertools.product(["metasoft", "snapkv_keydiff"], ["none", "key_bias"])


@pytest.mark.parametrize(("name", "consolidation"), PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn], ids=str)
def test_batch(name, consolidation, dtype):
    case = Case(0, 3, 2, 64, 16, dtype)
    pool = make_pool(case, [span + WINDOW for span in SPANS])
    jobs = make_jobs(case, pool, consolidation == "key_bias")
    method = make_method(name, consolidation, "triton")
    layer = LayerPool(pool.key, pool.value, 0.125, *case.scales)
    lengths = [job.probe.embeds.shape[0] for job in jobs]
    q = randn(sum(lengths), 6, 64, dtype=case.compute_dtype)
    k, v = (randn(sum(lengths), 3, 64, dtype=case.compute_dtype) for _ in range(2))
    gate = torch.rand(3, 1).to(DEVICE)
    batch = FusedBatch(jobs, method, probe_kernels.attend)
    out, consolidated, flags = batch.compress(q, k, v, layer, gate, 0)
    assert DEVICE == "cuda" or all(flag.item() for flag in flags)
    batch.write(layer, consolidated)
    method = make_method(name, consolidation, "torch")
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    kept = batch.kept_of_jobs(consolidated)
    inputs = zip(jobs, q.split(lengths), k.split(lengths), v.split(lengths), out.split(lengths), kept, strict=True)
    for job, *tensors, got, ours in inputs:
        expected, routes, merged, _ = compress_layer(job, *tensors, layer, method, gate)
        torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)
        same = (ours == routes.kept).all(1)
        assert same.all() if dtype == torch.float32 else (ours == routes.kept).float().mean() > 0.9
        for buffer, scale, entries in zip(layer[:2], case.scales, (merged.key, merged.value), strict=True):
            written = buffer[job.new_slots].float() * scale
            assert written.isfinite().all()
            quantized = entries if dtype == torch.float32 else (entries / scale).to(dtype).float() * scale
            difference = (written - quantized.float())[:, same].abs()
            # In float8 an affinity's near tie sends an entry elsewhere, and a value rounds to its neighbour.
            assert (difference > tolerance).float().mean() < (1e-6 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn], ids=str)
def test_in_a_layer_of_a_window_the_last_entries_stay_as_they_were(dtype):
    """Whatever the method and the consolidation would have chosen; the same fused and job by job."""
    case = Case(0, 3, 2, 64, 16, dtype)
    pool = make_pool(case, [span + WINDOW for span in SPANS])
    jobs, method = make_jobs(case, pool, True), make_method("judge_q", "key_bias", "triton")
    layer = LayerPool(pool.key, pool.value, 0.125, *case.scales, window_tokens=30)
    lengths = [job.probe.embeds.shape[0] for job in jobs]
    q = randn(sum(lengths), 6, 64, dtype=case.compute_dtype)
    k, v = (randn(sum(lengths), 3, 64, dtype=case.compute_dtype) for _ in range(2))
    batch = FusedBatch(jobs, method, probe_kernels.attend)
    out, consolidated, flags = batch.compress(q, k, v, layer, 1.0, 0)
    assert len(flags) == (0 if DEVICE == "cuda" else len(jobs)) and all(flags)
    batch.write(layer, consolidated)
    inputs = zip(jobs, q.split(lengths), k.split(lengths), v.split(lengths), out.split(lengths), strict=True)
    for job, *tensors, got in inputs:
        expected, routes, merged, _ = compress_layer(job, *tensors, layer, method, 1.0)
        torch.testing.assert_close(got, expected, atol=1e-2, rtol=1e-2)
        last = job.span_slots[job.plan.saved_slots :]
        whole = torch.arange(job.plan.span_tokens)
        assert all(torch.equal(kept.cpu(), whole[job.plan.saved_slots :]) for kept in routes.kept)
        assert all(torch.equal(dropped.cpu(), whole[: job.plan.saved_slots]) for dropped in routes.dropped)
        for buffer, scale, entries in zip(layer[:2], case.scales, (merged.key, merged.value), strict=True):
            assert torch.equal(buffer[job.new_slots].view(torch.uint8), buffer[last].view(torch.uint8))
            torch.testing.assert_close(entries.float(), buffer[last].float() * scale, atol=0, rtol=1e-2)
    for kept, job in zip(batch.kept_of_jobs(consolidated), jobs, strict=True):
        assert kept.shape == (3, job.plan.kept_slots) and (kept[:, 0] == job.plan.saved_slots).all()


@pytest.mark.parametrize("limit_bytes", [1, 13 * 2 * sum(SPANS) + 12 * 3 * sum(KEPT)], ids=["a head", "two heads"])
@pytest.mark.parametrize("name", ["judge_q", "metasoft", "snapkv_keydiff"])
def test_heads_in_pieces_give_the_same(name, limit_bytes, monkeypatch):
    """Where the workspace does not hold all heads: the same entries and the same bits."""
    case = Case(0, 3, 2, 64, 1, torch.bfloat16)
    pool = make_pool(case, [span + WINDOW for span in SPANS])
    jobs, method = make_jobs(case, pool, True), make_method(name, "key_bias", "triton")
    layer = LayerPool(pool.key, pool.value, 0.125, *case.scales)
    rows = sum(job.probe.embeds.shape[0] for job in jobs)
    q, k, v = (randn(rows, heads, 64, dtype=torch.bfloat16) for heads in (6, 3, 3))
    found = []
    for limit in (2**26, limit_bytes):
        monkeypatch.setattr(memory, "WORKSPACE_BYTES", limit)
        batch = FusedBatch(jobs, method, probe_kernels.attend)
        assert memory.heads_at_once(3, batch.span.total, batch.kept.total) == {2**26: 3, 1: 1}.get(limit, 2)
        _, consolidated, flags = batch.compress(q, k, v, layer, 1.0, 0)
        assert len(flags) == (0 if DEVICE == "cuda" else len(jobs)) and all(flags)
        found.append([consolidated.kept_rows, *consolidated.key_biases])
    for whole, pieces in zip(*found, strict=True):
        assert torch.equal(whole, pieces)
