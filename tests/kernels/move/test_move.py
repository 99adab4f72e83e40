"""Fused move against torch: the same bits, and nothing written elsewhere."""

import pytest
import torch
from metasoft_kernels.move import fused, move, naive

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
