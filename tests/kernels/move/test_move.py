"""Fused move against torch: the same bits, and nothing written elsewhere."""

import pytest
import torch
from metasoft_kernels.move import fused, move, naive
from metasoft_kernels.ragged import ragged

from tests.kernels.cases import DEVICE, FP8, Case, every_case, make_pool, randn
from tests.kernels.partition import partition


def bits(buffer: torch.Tensor) -> torch.Tensor:
    return buffer.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[buffer.dtype.itemsize])


@pytest.mark.parametrize("given", [True, False])
@every_case
def test_move(case, given):
    pool = make_pool(case, case.lengths)
    kept_rows, _, _, kept, _ = partition(case.groups, case.lengths)
    new_slots = pool.free[: kept.total]
    values = randn(kept.total, case.groups, case.d, dtype=case.compute_dtype) if given else None
    copies = pool.key.clone(), pool.value.clone()
    fused.move(pool.key, pool.value, pool.slots, kept_rows, new_slots, values, case.scales[1])
    naive.move(*copies, pool.slots, kept_rows.long(), new_slots, values, case.scales[1])
    for written, expected in zip((pool.key, pool.value), copies, strict=True):
        assert torch.equal(bits(written), bits(expected))
        assert not written[new_slots].isnan().any()


@every_case
def test_move_biased(case):
    pool = make_pool(case, case.lengths)
    kept_rows, _, _, kept, _ = partition(case.groups, case.lengths)
    new_slots = pool.free[: kept.total]
    biases, directions = randn(case.groups, kept.total), randn(3, 2, case.groups, case.d)[:, 1]  # of one layer of two
    copies = pool.key.clone(), pool.value.clone()
    scale = case.d**-0.5
    fused.move_biased(
        pool.key, pool.value, pool.slots, kept_rows, new_slots, biases, directions, kept, scale, case.scales[0]
    )
    for own, direction in zip(kept.ranges(), directions, strict=True):
        naive.move_biased(
            *copies, pool.slots, kept_rows[:, own].long(), new_slots[own], biases[:, own], direction, scale,
            case.scales[0],
        )  # fmt: skip
    assert torch.equal(bits(pool.value), bits(copies[1]))
    others = torch.ones(len(pool.key), dtype=torch.bool, device=DEVICE)
    others[new_slots] = False
    assert torch.equal(bits(pool.key)[others], bits(copies[0])[others])
    # The sum may be rounded once more or less: a key's last bit.
    step = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}.get(case.dtype, 0.25)
    written, expected = (buffer[new_slots].float() for buffer in (pool.key, copies[0]))
    torch.testing.assert_close(written, expected, atol=step, rtol=step)
    assert (written == expected).float().mean() > 0.99


@pytest.mark.parametrize("dtype", [*FP8, torch.bfloat16])
def test_numbers_are_rounded_as_torch_does(dtype):
    """Every bit pattern of float16, and numbers beside them: ties, subnormals, overflow, NaN."""
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16).float()
    numbers = torch.cat([halves, halves * (1 + 2**-20), halves * (1 - 2**-20), torch.randn(1000) * 300]).to(DEVICE)
    numbers = numbers[: numbers.numel() // 4096 * 4096]
    expected = numbers.to(dtype)
    # Of many heads: an entry of zeros, and room.
    pool = torch.zeros(2, numbers.numel() // 4096, 4096).to(dtype).to(DEVICE)
    nothing, room = torch.tensor([0]).to(DEVICE), torch.tensor([1]).to(DEVICE)
    rows = torch.zeros(pool.shape[1], 1, dtype=torch.int32, device=DEVICE)
    (kept,) = ragged(torch.device(DEVICE), [1])
    directions = numbers.view(1, -1, 4096)
    fused.move_biased(pool, pool.clone(), nothing, rows, room, torch.ones_like(rows).float(), directions, kept, 1.0)
    found, is_number = pool[1].flatten(), ~expected.isnan()
    if dtype == torch.float8_e4m3fn:  # torch before 2.14 has NaN for what is too large
        is_number |= numbers.abs() > 448
        expected = torch.where(numbers.abs() > 448, numbers.clamp(-448, 448), expected.float()).to(dtype)
    assert torch.equal(found.isnan(), ~is_number)
    assert torch.equal(found.float()[is_number], expected.float()[is_number])


@pytest.mark.parametrize("dtype", FP8)
def test_quantized_as_sglang_does(dtype):
    """Divided by the scale in the model's type, then cast: what ``MHATokenToKVPool.set_kv_buffer`` does."""
    case = Case(64, 2, 1, 64, 1, dtype)
    pool = make_pool(case, [64])
    kept = torch.arange(16).expand(2, 16).contiguous().to(DEVICE)
    values = randn(16, 2, 64, dtype=torch.bfloat16) * 3
    move(pool.key, pool.value, pool.slots, kept, pool.free[:16], values.clone(), 0.3, kernels="triton")
    expected = values.clone().div_(0.3).to(dtype)
    assert torch.equal(bits(pool.value[pool.free[:16]]), bits(expected))
