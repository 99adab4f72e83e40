"""The allocator that the CPU platform brings for SGLang 0.5.17."""

from importlib.metadata import version

import pytest
import torch

if version("sglang") != "0.5.17":
    pytest.skip("later versions choose an allocator themselves", allow_module_level=True)

import sglang.srt.plugins  # noqa: E402, F401
from metasoft_patches.sglang_0_5_17.cpu_allocator import TorchPagedAllocator  # noqa: E402


@pytest.mark.parametrize("page", [4, 16])  # with pages of 1, SGLang calls alloc alone
def test_requests_grow_by_whole_pages_and_share_none(page):
    allocator = TorchPagedAllocator(
        40 * page, page_size=page, dtype=torch.float32, device="cpu", kvcache=None, need_sort=False
    )
    lengths, rows = [0, 0, 0], [torch.empty(0, dtype=torch.int64)] * 3
    for step, growth in enumerate(([3, page, 2 * page + 1], [1, 1, 1], [page, 2, 1], [1, 1, 1])):
        before = torch.tensor(lengths)
        lengths = [length + more for length, more in zip(lengths, growth, strict=True)]
        after = torch.tensor(lengths)
        last = torch.tensor([int(row[-1]) if len(row) else -1 for row in rows])
        if step % 2:
            slots = allocator.alloc_decode(after, after, last)
        else:
            slots = allocator.alloc_extend(before, before, after, after, last, sum(growth))
        rows = [torch.cat([row, new]) for row, new in zip(rows, slots.split(growth), strict=True)]
        for row in rows:
            assert torch.equal(row % page, torch.arange(len(row)) % page)
            assert all(len(part.div(page, rounding_mode="floor").unique()) == 1 for part in row.split(page))
        pages = [part[0] // page for row in rows for part in row.split(page)]
        assert len(set(map(int, pages))) == len(pages) and 0 not in pages
        assert allocator.available_size() == (40 - len(pages)) * page
    for row in rows:
        allocator.free_segment(row, start_pos=0)
    assert allocator.available_size() == 40 * page


def test_what_does_not_fit_is_refused_and_changes_nothing():
    allocator = TorchPagedAllocator(16, page_size=4, dtype=torch.float32, device="cpu", kvcache=None, need_sort=False)
    none, all_and_one = torch.tensor([0]), torch.tensor([17])
    assert allocator.alloc_extend(none, none, all_and_one, all_and_one, torch.tensor([-1]), 17) is None
    assert allocator.available_size() == 16
