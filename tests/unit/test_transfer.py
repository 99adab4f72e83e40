"""Token ids on their way to the device."""

from array import array

import pytest
import torch

pytest.importorskip("sglang")
from metasoft_patches.transfer import to_device


@pytest.mark.parametrize("ids", [[], [7], [1 << 61, -1, 0], list(range(1000))])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_an_array_becomes_the_tensor_of_its_ids_and_may_grow_afterwards(ids, dtype):
    if dtype is torch.int32:
        ids = [number % 1000 for number in ids]
    values = array("q", ids)
    tensor = to_device(values, dtype, "cpu")
    assert tensor.dtype == dtype and tensor.tolist() == ids
    values.extend(range(10_000))  # raises if its memory is lent
    values[:1] = array("q", [5])
    assert tensor.tolist() == ids


def test_the_array_may_be_gone():
    tensor = to_device(array("q", range(100_000)), torch.int64, "cpu")
    assert tensor.sum() == 100_000 * 99_999 // 2


class Counted(array):
    """Counts what is read of it one by one."""

    reads = 0

    def __getitem__(self, index):
        self.reads += 1
        return super().__getitem__(index)

    def __iter__(self):
        return (self[index] for index in range(len(self)))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_an_array_is_never_read_id_by_id(dtype):
    """That takes 25 ms at 128K tokens, on the scheduler's thread."""
    ids = Counted("q", range(5000))
    torch.tensor(ids)
    assert ids.reads >= 5000, "torch alone does"
    ids.reads = 0
    assert torch.equal(to_device(ids, dtype, "cpu"), torch.arange(5000, dtype=dtype)) and ids.reads == 0


@pytest.mark.parametrize("values", [[1, 2], (3,), torch.tensor([4, 5], dtype=torch.int32)])
def test_other_values_are_taken_too(values):
    assert to_device(values, torch.int64, "cpu").tolist() == list(values)
