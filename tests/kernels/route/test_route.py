"""Fused routing against torch: the same targets unless two affinities are nearly equal, the same weights."""

import pytest
import torch
from metasoft_kernels.route import fused, naive, route
from metasoft_kernels.select import naive as select

from tests.kernels.cases import CASES, DEVICE, FP8, make_pool, randn
from tests.kernels.partition import partition

# Every number of targets on a GPU; in the interpreter one for each shape.
COUNTS = [(case, m) for n, case in enumerate(CASES) for m in (1, 3, 4) if DEVICE == "cuda" or m == (4, 3, 1, 4)[n % 4]]


# Bands narrower than the targets, than a tile, as wide as one, and wider; odd and even.
BANDS = [(case, (2, 7, 64, 129)[n % 4]) for n, case in enumerate(CASES)]


@pytest.mark.parametrize(("case", "m"), COUNTS, ids=str)
def test_route(case, m):
    check(case, m, None)


@pytest.mark.parametrize(("case", "band"), BANDS, ids=str)
def test_route_to_the_nearest(case, band):
    check(case, min(4, band), band)


def check(case, m, band):
    lengths = [max(2, length) for length in case.lengths]
    pool = make_pool(case, lengths)
    kept_rows, dropped_rows, span, kept, dropped = partition(case.groups, lengths)
    scale = case.d**-0.5 * case.scales[0] ** 2
    target, weight = fused.route(
        pool.key, pool.slots, kept_rows, dropped_rows, kept, dropped, m, scale, case.compute_dtype, band
    )
    assert target.shape == weight.shape == (case.groups, dropped.total, m)
    for entries, own, rows in zip(span.ranges(), kept.ranges(), dropped.ranges(), strict=True):
        keys = pool.key[pool.slots[entries]].float()
        local = [part.long() - entries.start for part in (kept_rows[:, own], dropped_rows[:, rows])]
        expected, expected_weight = naive.route(keys, *local, m, scale, band)
        found = expected.shape[-1]  # a request may keep fewer than m
        got, order = target[:, rows].long().sort(-1)
        got_weight = weight[:, rows].gather(-1, order)
        assert (got[..., found:] == kept.total).all() and (got_weight[..., found:] == 0).all()
        expected, order = (expected + own.start).sort(-1)
        is_same = (got[..., :found] == expected).all(-1)
        # In float8 affinities can be exactly equal; elsewhere they must nearly be for the choice to differ.
        assert is_same.float().mean() > (0.9 if case.dtype in FP8 else 0.999)
        torch.testing.assert_close(
            got_weight[..., :found][is_same], expected_weight.gather(-1, order)[is_same], atol=1e-4, rtol=1e-3
        )
        torch.testing.assert_close(got_weight.sum(-1), torch.ones_like(got_weight[..., 0]))


def test_of_equal_keys_the_earlier_is_the_target():
    keys = torch.ones(40, 1, 16).to(DEVICE)
    kept, dropped = torch.arange(30)[None].to(DEVICE), torch.arange(30, 40)[None].to(DEVICE)
    target, weight = route(keys, kept, dropped, 4, 0.25, kernels="triton")
    assert (target.sort(-1).values == torch.arange(4, device=DEVICE)).all() and (weight == 0.25).all()


def test_one_request_through_the_stage():
    keys = randn(300, 2, 64)
    kept, dropped = (rows.to(DEVICE) for rows in select.split_top(torch.rand(2, 300), 100, 0))
    results = []
    for kernels in ("triton", "torch"):
        target, weight = route(keys, kept, dropped, 4, 0.125, kernels=kernels)
        target, order = target.sort(-1)
        results.append((target, weight.gather(-1, order)))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])


def test_a_key_that_is_not_a_number_flows_nowhere():
    keys = randn(50, 1, 16)
    keys[49] = float("nan")
    kept, dropped = torch.arange(20)[None].to(DEVICE), torch.arange(20, 50)[None].to(DEVICE)
    _, weight = route(keys, kept, dropped, 4, 0.25, kernels="triton")
    assert (weight[0, 29] == 0).all() and weight.isfinite().all()
