"""Fused selection against the stable sort: exactly equal, ties, NaN and infinities included."""

import itertools

import pytest
import torch
from metasoft_kernels.ragged import ragged
from metasoft_kernels.select import fused, naive, split_top

from tests.kernels.cases import DEVICE, GROUPS, TOKENS


def assert_equal_to_the_sort(importance, spans, kept, sinks):
    axes = ragged(torch.device(DEVICE), spans, kept, [a - b for a, b in zip(spans, kept, strict=True)])
    on_device = torch.tensor(sinks, dtype=torch.int32, device=DEVICE)
    kept_rows, dropped_rows = fused.split_top(importance, on_device, *axes)
    rows_too = torch.empty_like(kept_rows)
    is_kept = fused.mark_top(importance, on_device, *axes[:2], rows_too)
    assert torch.equal(rows_too, kept_rows)
    assert torch.equal(is_kept, torch.zeros_like(is_kept).scatter_(1, kept_rows.long(), 1))
    ranges = zip(*(axis.ranges() for axis in axes), kept, sinks, strict=True)
    for span, kept_range, dropped_range, count, sink in ranges:
        expected = naive.split_top(importance[:, span], count, sink)
        assert torch.equal(kept_rows[:, kept_range] - span.start, expected[0])
        assert torch.equal(dropped_rows[:, dropped_range] - span.start, expected[1])


SIZES = itertools.product(TOKENS, GROUPS) if DEVICE == "cuda" else zip(TOKENS, (8, 1, 3, 1, 3, 1), strict=True)


@pytest.mark.parametrize(("tokens", "groups"), list(SIZES))
def test_split_top(tokens, groups, monkeypatch):
    monkeypatch.setattr(fused, "BLOCK", 1024)  # several blocks
    spans = [tokens, max(1, tokens // 2), 7]
    kept = [max(1, tokens // 4), max(1, tokens // 16), 7]
    importance = torch.rand(groups, sum(spans)).to(DEVICE) ** 8
    assert_equal_to_the_sort(importance, spans, kept, [1, 0, 3])


@pytest.mark.parametrize("levels", [1, 2, 5])
def test_of_equal_entries_the_earlier_stay(levels):
    importance = torch.randint(levels, (3, 900)).float().to(DEVICE)
    assert_equal_to_the_sort(importance, [600, 300], [150, 299], [4, 0])


def test_what_is_not_a_number_and_signed_zeros(monkeypatch):
    values = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1e-38, -1.0, 3.0])
    importance = values[torch.randint(len(values), (3, 500))].to(DEVICE)
    for kept in (1, 100, 250, 400, 499):
        assert_equal_to_the_sort(importance, [500], [kept], [min(kept, 4)])


def test_one_request_through_the_stage():
    importance = torch.rand(3, 333).to(DEVICE)
    for fast, plain in zip(
        split_top(importance, 80, 4, kernels="triton"), split_top(importance, 80, 4, kernels="torch"), strict=True
    ):
        assert fast.dtype == torch.int64 and torch.equal(fast, plain)
