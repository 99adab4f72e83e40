"""Odd sizes for kernel tests: all of them on a GPU, a selection that covers each value in the interpreter."""

import itertools
from typing import NamedTuple

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS = (1, 63, 64, 65, 1000, 4097)
GROUPS = (1, 3, 8)
HEAD_DIMS = (64, 80, 128, 256)
PAGES = (1, 16)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


class Case(NamedTuple):
    """One shape: tokens of the longest request, KV heads, query heads per KV head, head size, page size, entry type."""

    tokens: int
    groups: int
    r: int
    d: int
    page: int
    dtype: torch.dtype

    @property
    def compute_dtype(self) -> torch.dtype:
        """What the model computes in, where entries of this type are stored."""
        return torch.bfloat16 if self.dtype in FP8 else self.dtype

    @property
    def scales(self) -> tuple[float, float]:
        return (0.5, 0.75) if self.dtype in FP8 else (1.0, 1.0)

    @property
    def lengths(self) -> list[int]:
        """The spans of a ragged batch with this longest request."""
        return [max(1, self.tokens // 3), self.tokens, 1]

    def __str__(self) -> str:
        return f"L{self.tokens}-G{self.groups}-r{self.r}-d{self.d}-p{self.page}-{str(self.dtype)[6:]}"


COVERING = [
    Case(1, 8, 4, 128, 1, torch.bfloat16),
    Case(63, 3, 3, 64, 16, torch.float32),
    Case(64, 1, 1, 80, 1, torch.float16),
    Case(65, 8, 2, 256, 16, torch.bfloat16),
    Case(65, 3, 3, 80, 16, torch.float8_e5m2),
    Case(1000, 3, 7, 128, 16, torch.float8_e4m3fn),
    Case(1000, 1, 4, 256, 1, torch.float32),
    Case(4097, 1, 3, 64, 16, torch.bfloat16),
]
FULL = [
    Case(tokens, groups, 3 if groups == 3 else 4, d, page, dtype)
    for tokens, groups, d, page, dtype in itertools.product(TOKENS, GROUPS, HEAD_DIMS, PAGES, DTYPES)
]
CASES = COVERING if DEVICE == "cpu" else FULL
every_case = pytest.mark.parametrize("case", CASES, ids=str)


class Pool(NamedTuple):
    """One layer full of NaN, but for scattered pages that hold the entries of all requests."""

    key: torch.Tensor  # [slots, G, d]
    value: torch.Tensor
    slots: torch.Tensor  # [sum of lengths] int64
    free: torch.Tensor  # slots that hold nothing


def make_pool(case: Case, lengths: list[int]) -> Pool:
    pages = [-(-length // case.page) for length in lengths]
    shuffled = torch.randperm(2 * sum(pages) + 2)
    slots, used = [], 0
    for length, count in zip(lengths, pages, strict=True):
        mine = shuffled[used : used + count]
        slots.append((mine[:, None] * case.page + torch.arange(case.page)).flatten()[:length])
        used += count
    slots = torch.cat(slots)
    buffers = []
    for scale in case.scales:
        entries = (torch.randn(slots.numel(), case.groups, case.d) / scale).to(case.dtype)
        buffer = torch.full((shuffled.numel() * case.page, case.groups, case.d), float("nan")).to(case.dtype)
        bits = torch.uint8 if case.dtype in FP8 else case.dtype
        buffer.view(bits)[slots] = entries.view(bits)
        buffers.append(buffer.to(DEVICE))
    free = (shuffled[used:, None] * case.page + torch.arange(case.page)).flatten()
    return Pool(*buffers, slots.to(DEVICE), free.to(DEVICE))


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(dtype).to(DEVICE)


def nan_memory(monkeypatch) -> None:
    """``torch.empty`` gives NaN (or, of integers, an enormous number), so that what is not written shows."""
    empty = torch.empty

    def filled(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        if tensor.dtype == torch.bool:
            return tensor
        return tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max // 3)

    monkeypatch.setattr(torch, "empty", filled)
