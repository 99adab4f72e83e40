"""Biases of kept entries, group by group: two passes over the entries in order by group, then one over the kept ones.

In each pass a program has a part of the places and walks it tile by tile. What a tile's own groups keep and lose is
summed within the tile; only the first and the last group of a tile may have entries in others, which are read again.
The passes hand over one number an entry: of a kept one what it takes over, in units of its own attention; of a dropped
one its attention, as long as nobody carries it. Always the same order of sums, and no atomics.
"""

import torch
import triton
import triton.language as tl

from metasoft_kernels.bias.naive import LARGEST_BIAS, TINY, UNMATCHED_SHARE
from metasoft_kernels.parts import Scored, cut, read_importance, softmax_of_parts, sum_of_parts
from metasoft_kernels.ragged import Ragged
from metasoft_kernels.repeats.naive import Groups
from metasoft_kernels.tiles import cdiv

BLOCK = 64
KEPT_BLOCK = 128


def log_biases(
    scored: Scored,
    is_kept: torch.Tensor,
    kept_rows: torch.Tensor,
    groups: Groups,
    sink_tokens: torch.Tensor,
    span: Ragged,
    kept: Ragged,
    scratch: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`metasoft_kernels.bias.naive.log_biases` for all requests at once.

    Args:
        scored: the attention mass is the geometric mean of attention and importance where logs are given, else the
            attention.
        is_kept: ``[G, sum S]`` int8, 1 where an entry stays.
        kept_rows: ``[G, sum B]`` int32, those entries.
        groups: ``[2, sum S]``, those of each request in turn: dropped entries are carried by kept ones of the same
            group of the first row, else of the second.
        sink_tokens: ``[J]`` int32, first entries of each span, which carry nothing.
        span, kept: the requests' rows on their axes.
        scratch: ``[G, sum S]`` float32 that may be written; None: new memory.

    Returns:
        ``[G, sum B]`` float32.
    """
    heads = kept_rows.shape[0]
    parts = cut(span, heads)
    carried = torch.empty_like(scored.attention) if scratch is None else scratch
    sums = torch.empty(2, heads, span.num_requests, parts.number, dtype=torch.float32, device=carried.device)
    biases = torch.empty(kept_rows.shape, dtype=torch.float32, device=carried.device)
    softmax = scored.attention if scored.sums is None else scored.sums
    for number, (order, first, end) in enumerate(zip(*groups, strict=True)):
        _pass_on[(parts.number, heads, span.num_requests)](
            scored.attention, scored.importance, softmax, is_kept, carried, sums, order, first, end, sink_tokens,
            span.starts, carried.stride(0), parts.entries, scored.parts.entries, scored.parts.number, BLOCK=BLOCK,
            TINY=TINY, IS_LOG=scored.is_log, IS_SECOND=number == 1, num_warps=4,
        )  # fmt: skip
    _biases[(cdiv(kept.longest, KEPT_BLOCK), heads, span.num_requests)](
        carried, sums, kept_rows, biases, span.starts, kept.starts, carried.stride(0), kept.total, parts.entries,
        parts.number, BLOCK=KEPT_BLOCK, TINY=TINY, SHARE=UNMATCHED_SHARE, LARGEST=LARGEST_BIAS, num_warps=4,
    )  # fmt: skip
    return biases


@triton.jit
def _read(
    attention, importance, is_kept, carried, order, place, mask, begin, sinks, largest, total, IS_LOG: tl.constexpr,
    IS_SECOND: tl.constexpr,
):  # fmt: skip
    """At some places of the order: the entries, whether they stay, and their attention as kept and as dropped ones."""
    entry = tl.load(order + place, mask=mask, other=0) + begin
    stays = mask & (tl.load(is_kept + entry, mask=mask, other=0) != 0)
    mass = tl.load(attention + entry, mask=mask, other=0.0)
    if IS_LOG:
        mass = tl.sqrt(mass * read_importance(importance, entry, mask, largest, total, IS_LOG))
    mass = tl.where(mask & (tl.abs(mass) < float("inf")) & (entry - begin >= sinks), mass, 0.0)
    own, lacking = tl.where(stays, mass, 0.0), tl.where(stays, 0.0, mass)
    if IS_SECOND:
        lacking = tl.load(carried + entry, mask=mask & (stays == 0), other=0.0)
    return entry, stays, own, lacking


@triton.jit(
    do_not_specialize=["stride", "part_entries", "softmax_entries", "softmax_count"],
    do_not_specialize_on_alignment=["order", "firsts", "ends"],  # rows of one tensor
)
def _pass_on(
    attention, importance, softmax, is_kept, carried, sums, order, firsts, ends, sink_tokens, span_starts, stride,
    part_entries, softmax_entries, softmax_count, BLOCK: tl.constexpr, TINY: tl.constexpr, IS_LOG: tl.constexpr,
    IS_SECOND: tl.constexpr,
):  # fmt: skip
    part, group, job = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    span_start, span_end = tl.load(span_starts + job), tl.load(span_starts + job + 1)
    begin = span_start + part * part_entries
    if begin < span_end:
        sinks = tl.load(sink_tokens + job)
        largest, total = 0.0, 1.0
        if IS_LOG:
            row = softmax + (group * tl.num_programs(2) + job) * softmax_count
            second = softmax_count.to(tl.int64) * tl.num_programs(1) * tl.num_programs(2)
            largest, total = softmax_of_parts(row, row + second, tl.cdiv(span_end - span_start, softmax_entries))
        attention += group * stride
        importance += group * stride
        is_kept += group * stride
        carried += group * stride
        part_end = tl.minimum(begin + part_entries, span_end)
        all_own, all_lost = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        for tile in range(begin, part_end, BLOCK):
            place = tile + tl.arange(0, BLOCK)
            inside = place < part_end
            entry, stays, own, lacking = _read(
                attention, importance, is_kept, carried, order, place, inside, span_start, sinks, largest, total,
                IS_LOG, IS_SECOND,
            )  # fmt: skip
            mine = tl.load(firsts + place, mask=inside, other=-1)
            is_same = mine[:, None] == mine[None, :]
            holds = tl.sum(tl.where(is_same, own[None, :], 0.0), 1)
            lacks = tl.sum(tl.where(is_same, lacking[None, :], 0.0), 1)
            tile_end = tl.minimum(tile + BLOCK, part_end)
            # Of the first group what lies before the tile, of the last one what lies after it.
            for side in tl.static_range(2):
                at = tile if side == 0 else tile_end - 1
                group_first = tl.load(firsts + at)
                near = span_start + group_first if side == 0 else tile_end
                far = tile if side == 0 else span_start + tl.load(ends + at)
                more_own, more_lacking = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
                for other in range(near, far, BLOCK):
                    other_place = other + tl.arange(0, BLOCK)
                    _, _, other_own, other_lacking = _read(
                        attention, importance, is_kept, carried, order, other_place, other_place < far, span_start,
                        sinks, largest, total, IS_LOG, IS_SECOND,
                    )  # fmt: skip
                    more_own += other_own
                    more_lacking += other_lacking
                holds += tl.where(mine == group_first, tl.sum(more_own, 0), 0.0)
                lacks += tl.where(mine == group_first, tl.sum(more_lacking, 0), 0.0)
            is_held = holds > TINY
            gain = tl.where(is_held, lacks / tl.maximum(holds, TINY), 0.0)
            lost = tl.where(is_held, 0.0, lacking)
            if IS_SECOND:
                gain += 1.0 + tl.load(carried + entry, mask=stays, other=0.0)
                all_own += own * gain
                all_lost += lost
                # What has no attention of its own carries nothing.
                tl.store(carried + entry, tl.where(own > TINY, gain, -1.0), mask=stays)
            else:
                tl.store(carried + entry, tl.where(stays, gain, lost), mask=inside)
        if IS_SECOND:
            at = (group * tl.num_programs(2) + job) * tl.num_programs(0) + part
            tl.store(sums + at, tl.sum(all_own, 0))
            second = tl.num_programs(0).to(tl.int64) * tl.num_programs(1) * tl.num_programs(2)
            tl.store(sums + second + at, tl.sum(all_lost, 0))


@triton.jit(
    do_not_specialize=["stride", "kept_total", "part_entries", "part_count"],
    do_not_specialize_on_alignment=["kept_rows"],
)
def _biases(
    carried, sums, kept_rows, biases, span_starts, kept_starts, stride, kept_total, part_entries, part_count,
    BLOCK: tl.constexpr, TINY: tl.constexpr, SHARE: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    tile, group, job = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    kept_start, kept_end = tl.load(kept_starts + job), tl.load(kept_starts + job + 1)
    if kept_start + tile * BLOCK < kept_end:
        parts = tl.cdiv(tl.load(span_starts + job + 1) - tl.load(span_starts + job), part_entries)
        row = sums + (group * tl.num_programs(2) + job) * part_count
        second = part_count.to(tl.int64) * tl.num_programs(1) * tl.num_programs(2)
        share = sum_of_parts(row + second, parts) / tl.maximum(sum_of_parts(row, parts), TINY)
        kept = kept_start + tile * BLOCK + tl.arange(0, BLOCK)
        inside = kept < kept_end
        entry = tl.load(kept_rows + group * kept_total + kept, mask=inside, other=0)
        gain = tl.load(carried + group * stride + entry, mask=inside, other=1.0)
        bias = tl.log(tl.maximum(gain * (1 + SHARE * share), 1.0))
        bias = tl.where(gain < 0, 0.0, tl.minimum(bias, LARGEST))
        tl.store(biases + group * kept_total + kept, bias, mask=inside)
