"""Fused consolidation against torch; the same bits from run to run."""

import torch
from metasoft_kernels.merge import attention_flow, fused, naive

from tests.kernels.cases import DEVICE, Case, every_case, make_pool, randn
from tests.kernels.partition import partition

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def routes(groups, kept, dropped, m, crowded: float = 0.5):
    """Random targets, a share of them on each request's first kept entry: long runs."""
    targets, weights = [], []
    for own, count in zip(kept.ranges(), dropped.lengths, strict=True):
        width = own.stop - own.start
        target = torch.rand(groups, count, width).argsort(-1)[..., :m]  # distinct
        crowd = (torch.rand(groups, count, 1) < crowded) & (target != 0).all(-1, keepdim=True)
        target = torch.where(crowd & (torch.arange(target.shape[-1]) == 0), 0, target)
        weight = torch.rand(target.shape).softmax(-1)
        missing = m - target.shape[-1]
        targets.append(torch.nn.functional.pad(target + own.start, (0, missing), value=kept.total))
        weights.append(torch.nn.functional.pad(weight, (0, missing)))
    return torch.cat(targets, 1).to(torch.int32).to(DEVICE), torch.cat(weights, 1).to(DEVICE)


@every_case
def test_attention_flow(case):
    pool = make_pool(case, case.lengths)
    kept_rows, dropped_rows, span, kept, dropped = partition(case.groups, case.lengths, 4 if case.tokens < 1000 else 50)
    if dropped.total == 0:
        dropped_rows = dropped_rows[:, :0]
    target, weight = routes(case.groups, kept, dropped, 4)
    mass = torch.rand(case.groups, span.total).to(DEVICE)
    gate = torch.rand(case.groups).to(DEVICE)
    arguments = (pool.value, pool.slots, mass, kept_rows, dropped_rows, target, weight, kept, gate, case.scales[1])
    merged, is_finite = fused.attention_flow(*arguments, case.compute_dtype)
    assert merged.dtype == case.compute_dtype and is_finite.all()
    tolerance = TOLERANCE[case.compute_dtype]
    for entries, own, rows in zip(span.ranges(), kept.ranges(), dropped.ranges(), strict=True):
        m = min(4, own.stop - own.start)
        expected = naive.attention_flow(
            pool.value[pool.slots[entries]].float() * case.scales[1],
            mass[:, entries],
            kept_rows[:, own].long() - entries.start,
            dropped_rows[:, rows].long() - entries.start,
            target[:, rows, :m].long() - own.start,
            weight[:, rows, :m],
            gate.unsqueeze(1),
        )
        torch.testing.assert_close(merged[own].float(), expected, atol=tolerance, rtol=tolerance)
    if DEVICE == "cuda" or case.tokens == 64:
        again, _ = fused.attention_flow(*arguments, case.compute_dtype)
        assert torch.equal(merged, again)


def test_one_request_through_the_stage():
    kept_rows, dropped_rows, _, kept, dropped = partition(2, [400])
    target, weight = routes(2, kept, dropped, 4)
    args = (randn(400, 2, 80), torch.rand(2, 400).to(DEVICE), kept_rows.long(), dropped_rows.long(), target.long())
    for gate_scale in (0.5, torch.tensor([[0.25], [1.0]], device=DEVICE)):
        fast, plain = (attention_flow(*args, weight, gate_scale, kernels=name) for name in ("triton", "torch"))
        torch.testing.assert_close(fast, plain, atol=2e-5, rtol=1e-5)


def test_a_value_that_is_not_finite_stays_as_it_was_and_is_reported():
    case = Case(60, 1, 1, 64, 1, torch.float32)
    pool = make_pool(case, [60])
    kept_rows, dropped_rows, _, kept, dropped = partition(1, [60])
    target, weight = routes(1, kept, dropped, 2)
    pool.value[pool.slots[dropped_rows[0, 5].item()]] = float("inf")
    merged, is_finite = fused.attention_flow(
        pool.value, pool.slots, torch.rand(1, 60).to(DEVICE), kept_rows, dropped_rows, target, weight, kept,
        torch.ones(1).to(DEVICE), 1.0, torch.float32,
    )  # fmt: skip
    assert merged.isfinite().all()
    hit = target[0, 5].long()
    assert not is_finite[0, hit].any() and is_finite.sum() == kept.total - 2
    torch.testing.assert_close(merged[hit, 0], pool.value[pool.slots[kept_rows[0, hit].long()], 0])
