"""Selection without a sort: the B-th largest importance by its digits, then one compaction that keeps the order.

One program per KV head and request. Four passes count how often each 8-bit digit occurs and narrow down the cut; a
fifth writes kept and dropped entries in ascending order, or kept ones and for each entry whether it stays. Of entries
that equal the cut the first ones stay, so the result is the stable sort's.
"""

import torch
import triton
import triton.language as tl

from metasoft_kernels.ragged import Ragged
from metasoft_kernels.tiles import next_power_of_2

SMALLEST_BLOCK, BLOCK = 256, 4096  # a power of two of entries between them, for which the kernel is compiled


def split_top(
    importance: torch.Tensor, sink_tokens: torch.Tensor, span: Ragged, kept: Ragged, dropped: Ragged
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`metasoft_kernels.select.naive.split_top` for all requests at once.

    Args:
        importance: ``[G, sum S]`` float32.
        sink_tokens: ``[J]`` int32, first entries of each span that are kept whatever their importance.
        span, kept, dropped: the requests' rows on the three axes.

    Returns:
        ``[G, sum B]`` kept and ``[G, sum N]`` dropped entries, int32, each request's ascending. They count along the
        whole span axis: request j's first entry is ``span.starts[j]``.
    """
    groups = importance.shape[0]
    kept_rows, dropped_rows = (
        torch.empty(groups, axis.total, dtype=torch.int32, device=importance.device) for axis in (kept, dropped)
    )
    _launch(importance, sink_tokens, kept_rows, dropped_rows, span, kept, dropped, marks=False)
    return kept_rows, dropped_rows


def mark_top(
    importance: torch.Tensor, sink_tokens: torch.Tensor, span: Ragged, kept: Ragged, kept_rows: torch.Tensor
) -> torch.Tensor:
    """:func:`split_top` for who asks of each entry whether it stays.

    Args:
        kept_rows: ``[G, sum B]`` int32, contiguous, is filled with the kept entries.

    Returns:
        ``[G, sum S]`` int8: 1 where an entry stays, else 0.
    """
    is_kept = torch.empty(importance.shape, dtype=torch.int8, device=importance.device)
    _launch(importance, sink_tokens, kept_rows, is_kept, span, kept, kept, marks=True)
    return is_kept


def _launch(importance, sink_tokens, kept_rows, rest, span: Ragged, kept: Ragged, dropped: Ragged, marks: bool) -> None:
    block = min(BLOCK, max(SMALLEST_BLOCK, next_power_of_2(span.longest)))
    _split_top[(importance.shape[0], span.num_requests)](
        importance, sink_tokens, kept_rows, rest, span.starts, kept.starts, dropped.starts, span.total, kept.total,
        dropped.total, BLOCK=block, MARKS=marks, num_warps=8,
    )  # fmt: skip


@triton.jit
def _order(importance, at, entry, inside, sinks):
    """Numbers whose order, as unsigned integers, is that of the entries: sinks first, NaN last."""
    value = tl.load(importance + at + entry, mask=inside, other=0.0)
    value = tl.where(value == 0.0, 0.0, value)
    bits = value.to(tl.int32, bitcast=True)
    # Negative numbers: all bits turned; others: the sign bit set.
    ordered = (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)
    ordered = tl.where(value == value, ordered, 0)
    return tl.where(entry < sinks, 0xFFFFFFFF, ordered).to(tl.uint32)


@triton.jit(do_not_specialize=["span_total", "kept_total", "dropped_total"], do_not_specialize_on_alignment=["kept"])
def _split_top(
    importance, sink_tokens, kept, rest, span_starts, kept_starts, dropped_starts, span_total, kept_total,
    dropped_total, BLOCK: tl.constexpr, MARKS: tl.constexpr,
):  # fmt: skip
    group, job = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start = tl.load(span_starts + job)
    entries = tl.load(span_starts + job + 1) - start
    kept_start, dropped_start = tl.load(kept_starts + job), tl.load(dropped_starts + job)
    wanted = tl.load(kept_starts + job + 1) - kept_start
    sinks = tl.load(sink_tokens + job)
    at = group * span_total + start
    digits = tl.arange(0, 256)
    cut = tl.zeros([1], tl.uint32)
    for step in tl.static_range(4):
        shift = 24 - 8 * step
        counts = tl.zeros([256], tl.int32)
        for first in range(0, entries, BLOCK):
            entry = first + tl.arange(0, BLOCK)
            ordered = _order(importance, at, entry, entry < entries, sinks)
            matches = entry < entries
            if step > 0:
                matches = matches & ((ordered >> (shift + 8)) == (cut >> (shift + 8)))
            counts += tl.histogram(((ordered >> shift) & 255).to(tl.int32), 256, mask=matches)
        at_least = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts  # entries with this digit or a larger one
        digit = tl.sum((at_least >= wanted).to(tl.int32), 0) - 1
        wanted -= tl.sum(tl.where(digits > digit, counts, 0), 0)
        cut = cut | (digit.to(tl.uint32) << shift)
    above, equal = 0, 0
    for first in range(0, entries, BLOCK):
        entry = first + tl.arange(0, BLOCK)
        inside = entry < entries
        ordered = _order(importance, at, entry, inside, sinks)
        is_equal = (inside & (ordered == cut)).to(tl.int32)
        equal_before = equal + tl.cumsum(is_equal, 0) - is_equal
        stays = inside & ((ordered > cut) | ((is_equal > 0) & (equal_before < wanted)))
        position = above + tl.cumsum(stays.to(tl.int32), 0) - stays.to(tl.int32)
        tl.store(kept + group * kept_total + kept_start + position, start + entry, mask=stays)
        if MARKS:
            tl.store(rest + at + entry, stays.to(tl.int8), mask=inside)
        else:
            dropped = rest + group * dropped_total + dropped_start + entry - position
            tl.store(dropped, start + entry, mask=inside & (stays == 0))
        above += tl.sum(stays.to(tl.int32), 0)
        equal += tl.sum(is_equal, 0)
