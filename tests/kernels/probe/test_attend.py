"""Fused probe attention against torch, for ragged batches over scattered slots."""

import itertools
import math

import pytest
import torch
from metasoft_kernels.probe import attend, fused, naive
from metasoft_kernels.ragged import ragged

from tests.kernels.cases import CASES, DEVICE, Case, every_case, make_pool, randn

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def assert_attends(case, monkeypatch, window=None, seen_at_most=None):
    monkeypatch.setattr(fused, "SHORTEST_PART", 128)  # several parts
    pool = make_pool(case, case.lengths)
    probes = [5, 32, 1]
    dtype, tolerance = case.compute_dtype, TOLERANCE[case.compute_dtype]
    q = randn(sum(probes), case.groups * case.r, case.d, dtype=dtype)
    k_new, v_new = (randn(sum(probes), case.groups, case.d, dtype=dtype) for _ in range(2))
    probe, context = ragged(torch.device(DEVICE), probes, case.lengths)
    rest = (case.d**-0.5, *case.scales)
    slots, seen = pool.slots, [slice(one.start, one.stop) for one in context.ranges()]
    if seen_at_most is not None:  # what a window hides need not be handed over
        seen = [slice(max(one.start, one.stop - seen_at_most), one.stop) for one in seen]
        slots = torch.cat([pool.slots[one] for one in seen])
        (context,) = ragged(torch.device(DEVICE), [one.stop - one.start for one in seen])
    out, lse = fused.attend(q, pool.key, pool.value, slots, k_new, v_new, probe, context, *rest, window)
    assert out.dtype == dtype
    for own, before in zip(probe.ranges(), seen, strict=True):
        one = (q[own], pool.key, pool.value, pool.slots[before], k_new[own], v_new[own], *rest, window)
        expected, expected_lse = naive.attend(*one)
        torch.testing.assert_close(lse[own], expected_lse, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(out[own], expected, atol=tolerance, rtol=tolerance)


@every_case
def test_attend(case, monkeypatch):
    assert_attends(case, monkeypatch)


WINDOWS = (2, 20, 65, 500)
WINDOWED = [(CASES[1], 2), (CASES[1], 20), (CASES[3], 20), (CASES[3], 65), (CASES[6], 200)]


@pytest.mark.parametrize(
    ("case", "window"), WINDOWED if DEVICE == "cpu" else itertools.product(CASES, WINDOWS), ids=str
)
def test_attend_in_a_window(case, window, monkeypatch):
    """Shorter than the probe, so that some of it sees nothing of the prompt, or longer than a part of the context."""
    assert_attends(case, monkeypatch, window)
    assert_attends(case, monkeypatch, window, seen_at_most=window - 1)


@pytest.mark.parametrize("window", [None, 100])
def test_one_request_through_the_stage(window):
    case = Case(700, 2, 2, 64, 1, torch.float32)
    pool = make_pool(case, [700])
    args = (randn(9, 4, 64), pool.key, pool.value, pool.slots, randn(9, 2, 64), randn(9, 2, 64), 0.125)
    both = (attend(*args, kernels=kernels, window=window) for kernels in ("triton", "torch"))
    for fast, plain in zip(*both, strict=True):
        torch.testing.assert_close(fast, plain, atol=2e-5, rtol=1e-5)


def test_more_rows_than_a_tile_and_nothing_before_the_probe():
    q, k, v = randn(70, 8, 64), randn(70, 2, 64), randn(70, 2, 64)
    nothing = torch.empty(0, dtype=torch.int64, device=DEVICE)
    args = (q, k, v, nothing, k, v, 0.125)
    for fast, plain in zip(attend(*args, kernels="triton"), attend(*args, kernels="torch"), strict=True):
        torch.testing.assert_close(fast, plain, atol=2e-5, rtol=1e-5)


def test_attention_computed_elsewhere_is_merged_with_the_probes_own_tokens():
    case = Case(150, 2, 3, 64, 1, torch.float32)
    pool = make_pool(case, [150, 40])
    q, k_new, v_new = randn(11, 6, 64), randn(11, 2, 64), randn(11, 2, 64)
    probe, context = ragged(torch.device(DEVICE), [4, 7], [150, 40])
    outs, lses, expected = [], [], []
    for own, seen in zip(probe.ranges(), context.ranges(), strict=True):
        keys, values = pool.key[pool.slots[seen]], pool.value[pool.slots[seen]]
        logits = torch.einsum("tgrd,sgd->tgrs", q[own].view(-1, 2, 3, 64), keys) * 0.125
        outs.append(torch.einsum("tgrs,sgd->tgrd", logits.softmax(-1), values).flatten(1, 2))
        lses.append(logits.logsumexp(-1).flatten(1, 2))
        expected.append(naive.attend(q[own], pool.key, pool.value, pool.slots[seen], k_new[own], v_new[own], 0.125))
    base_2 = torch.cat(lses) / math.log(2)
    merged = fused.merge_with_self(q, torch.cat(outs), base_2, k_new, v_new, probe, 0.125, math.log(2))
    for got, parts in zip(merged, zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(got, torch.cat(parts), atol=2e-5, rtol=1e-5)
