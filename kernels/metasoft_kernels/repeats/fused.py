"""Repeats without a sort per layer: entries are in order by group already; each is compared with its own group alone.

A program has a tile of places and walks from where its first entry's group begins to where its last one's ends. Most
groups are short. One group of n entries costs n² comparisons of two instructions: in the worst prompt, the same token
over and over, 24 for each pair of tokens and layer (eight KV heads), beside the 8,192 flops that the prompt's own
attention spends on that pair (Llama-3.1-8B).
"""

import torch
import triton
import triton.language as tl

from metasoft_kernels.parts import Scored, read_importance, softmax_of_parts
from metasoft_kernels.ragged import Ragged
from metasoft_kernels.repeats.naive import Groups
from metasoft_kernels.tiles import cdiv

BLOCK = 64


def demote(scored: Scored, groups: Groups, span: Ragged) -> torch.Tensor:
    """:func:`metasoft_kernels.repeats.naive.demote` for all requests at once.

    Args:
        scored: whose importance is at least 0, or logs.
        groups: ``[n, sum S]``, those of each request in turn; the first row counts.
        span: the requests' rows on that axis.

    Returns:
        ``[G, sum S]`` float32, finite.
    """
    values = scored.importance
    ranked = torch.empty_like(values)
    sums = values if scored.sums is None else scored.sums
    _demote[(cdiv(span.longest, BLOCK), values.shape[0], span.num_requests)](
        values, sums, ranked, groups.order, groups.first, groups.end, span.starts, values.stride(0),
        scored.parts.entries, scored.parts.number, BLOCK=BLOCK, IS_LOG=scored.is_log, num_warps=4,
    )  # fmt: skip
    return ranked


@triton.jit(
    do_not_specialize=["stride", "part_entries", "part_count"],
    do_not_specialize_on_alignment=["order", "firsts", "ends"],
)
def _demote(
    values, sums, ranked, order, firsts, ends, span_starts, stride, part_entries, part_count, BLOCK: tl.constexpr,
    IS_LOG: tl.constexpr,
):  # fmt: skip
    tile, group, job = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    span_end = tl.load(span_starts + job + 1)
    span_start = tl.load(span_starts + job)
    begin = span_start + tile * BLOCK
    if begin < span_end:
        largest, total = 0.0, 1.0
        if IS_LOG:
            row = sums + (group * tl.num_programs(2) + job) * part_count
            second = part_count.to(tl.int64) * tl.num_programs(1) * tl.num_programs(2)
            largest, total = softmax_of_parts(row, row + second, tl.cdiv(span_end - span_start, part_entries))
        place = begin + tl.arange(0, BLOCK)
        inside = place < span_end
        entry = tl.load(order + place, mask=inside, other=0) + span_start
        mine = tl.load(firsts + place, mask=inside, other=-1)
        own = read_importance(values, group * stride + entry, inside, largest, total, IS_LOG)
        before, together = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.float32)
        end = span_start + tl.load(ends + tl.minimum(begin + BLOCK, span_end) - 1)
        for other_begin in range(span_start + tl.load(firsts + begin), end, BLOCK):
            other_place = other_begin + tl.arange(0, BLOCK)
            is_other = other_place < end
            other_entry = tl.load(order + other_place, mask=is_other, other=0) + span_start
            theirs = tl.load(firsts + other_place, mask=is_other, other=-2)
            other = read_importance(values, group * stride + other_entry, is_other, largest, total, IS_LOG)
            is_same = mine[:, None] == theirs[None, :]
            # Within a group the order is that of the prompt.
            is_better = (other[None, :] > own[:, None]) | (
                (other[None, :] == own[:, None]) & (other_place[None, :] < place[:, None])
            )
            before += tl.sum((is_same & is_better).to(tl.int32), 1)
            together += tl.sum(tl.where(is_same, other[None, :], 0.0), 1)
        result = tl.where(before == 0, tl.sqrt(own * together), own / (1 + before).to(tl.float32))
        tl.store(ranked + group * stride + entry, result, mask=inside)
