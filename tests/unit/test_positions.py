"""The position offset, and what decode graphs rely on: their buffer is filled from ``forward_batch.positions``."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("sglang")
from metasoft_patches.scheduler import SchedulerHooks

from sglang_metasoft.config import MetaSoftConfig


def shift(positions: torch.Tensor, offsets: list[int | None], extend_lens: list[int] | None = None) -> torch.Tensor:
    """Run the hook as after ``ForwardBatch.init_new``; an offset of None is a request that MetaSoft does not know."""
    reqs = [SimpleNamespace(metasoft=None if o is None else SimpleNamespace(offset=o)) for o in offsets]
    mode = SimpleNamespace(is_decode=lambda: extend_lens is None)
    batch = SimpleNamespace(reqs=reqs, forward_mode=mode, extend_lens=extend_lens)
    forward_batch = SimpleNamespace(positions=positions)
    SchedulerHooks(MetaSoftConfig(), adapter=None).shift_positions(forward_batch, None, batch, None)
    return forward_batch.positions


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_a_decode_step_gets_a_new_tensor_of_the_same_kind(dtype):
    buffer = torch.tensor([500, 7, 90, 0, 0], dtype=dtype)
    positions = buffer[:3]  # SGLang may hand out a view of a buffer that it fills again
    shifted = shift(positions, [1500, 0, None])
    assert shifted.tolist() == [2000, 7, 90] and shifted.dtype == dtype
    assert shifted.data_ptr() != buffer.data_ptr() and buffer.tolist() == [500, 7, 90, 0, 0]


def test_without_a_compressed_request_the_very_tensor_stays():
    """So that a graph runner that filled its buffer ahead need not copy again."""
    positions = torch.tensor([3, 4])
    assert shift(positions, [0, None]) is positions


def test_prefill_and_mixed_batches_shift_every_token_of_a_request():
    positions = torch.tensor([10, 11, 12, 70, 5, 6])
    assert shift(positions, [100, 30, 0], extend_lens=[3, 1, 2]).tolist() == [110, 111, 112, 100, 5, 6]
