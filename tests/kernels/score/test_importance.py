"""Fused importance against torch, for ragged batches over scattered slots."""

import pytest
import torch
from metasoft_kernels.ragged import ragged
from metasoft_kernels.score import fused, importance, naive

from tests.kernels.cases import DEVICE, Case, every_case, make_pool, randn


@every_case
def test_importance(case):
    pool = make_pool(case, case.lengths)
    probes = [5, 32, 1]
    q = randn(sum(probes), case.groups * case.r, case.d, dtype=case.compute_dtype)
    lse = randn(sum(probes), case.groups * case.r) + 9
    probe, span = ragged(torch.device(DEVICE), probes, case.lengths)
    scale, k_scale = case.d**-0.5, case.scales[0]
    mass = fused.importance(q, pool.key, pool.slots, lse, probe, span, scale, k_scale)
    for tokens, entries in zip(probe.ranges(), span.ranges(), strict=True):
        expected = naive.importance(q[tokens], pool.key, pool.slots[entries], lse[tokens], scale, k_scale)
        torch.testing.assert_close(mass[:, entries], expected, atol=1e-7, rtol=2e-4)


def test_one_request_through_the_stage():
    case = Case(65, 3, 3, 64, 16, torch.float32)
    pool = make_pool(case, [65])
    q, lse = randn(7, 9, 64), randn(7, 9) + 5
    args = (q, pool.key, pool.slots, lse, 0.125)
    torch.testing.assert_close(importance(*args, kernels="triton"), importance(*args, kernels="torch"))


def test_a_query_that_is_not_a_number_shows():
    case = Case(70, 1, 1, 64, 1, torch.float32)
    pool = make_pool(case, [70])
    q, lse = randn(3, 1, 64), randn(3, 1)
    lse[1] = float("nan")
    assert not importance(q, pool.key, pool.slots, lse, 0.125, kernels="triton").isfinite().any()


def test_unknown_kernels_are_refused():
    with pytest.raises(ValueError, match="'cuda' is not allowed; allowed: one of: auto, torch, triton"):
        importance(randn(1, 1, 16), randn(1, 1, 16), torch.zeros(1).long(), randn(1, 1), 1.0, kernels="cuda")
