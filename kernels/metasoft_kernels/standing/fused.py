"""The better standing over K where it lies: nothing of the keys' size leaves the chip.

Three launches: sums over the parts of a span, of the logs and of the keys' directions; the cosines with the mean
direction, less their mean, and their sums; the two standings. Sums are float32, always in the same order.
"""

import torch
import triton
import triton.language as tl

from metasoft_kernels.parts import STEP, Scored, cut, sum_of_parts
from metasoft_kernels.ragged import Ragged
from metasoft_kernels.standing.naive import MASS_FLOOR, POOL_ENTRIES, SMALLEST_DEVIATION, UNLIKE_FOR_ONE
from metasoft_kernels.tiles import padded

BLOCK = 64  # keys in registers at a time
SHORTEST = 1e-12  # of a key, as in torch's normalize


def better_standing(mass: torch.Tensor, k_buffer: torch.Tensor, slots: torch.Tensor, span: Ragged) -> Scored:
    """:func:`metasoft_kernels.standing.naive.better_standing` for all requests at once.

    Args:
        mass: ``[G, sum S]`` float32 attention of the probe.
        k_buffer: ``[slots, G, d]`` one layer of the pool, of any scale.
        slots: ``[sum S]`` slots of the spans.
        span: the requests' rows in ``slots``.

    Returns:
        The attention, and the importance: what is not finite in either counts as 0.
    """
    groups, d = k_buffer.shape[1:]
    parts = cut(span, groups)
    shape = (2, groups, span.num_requests, parts.number)
    log_sums, cosine_sums = (torch.empty(shape, dtype=torch.float32, device=mass.device) for _ in range(2))
    directions = torch.empty((*shape[1:], d), dtype=torch.float32, device=mass.device)
    importance = torch.empty_like(mass)
    grid = (parts.number, groups, span.num_requests)
    _standing_sums[grid](
        mass, k_buffer, slots, log_sums, directions, span.starts, mass.stride(0), k_buffer.stride(0), parts.entries,
        D=d, FLOOR=MASS_FLOOR, POOL=POOL_ENTRIES, SHORTEST=SHORTEST, BLOCK=BLOCK, BLOCK_D=padded(d), num_warps=4,
    )  # fmt: skip
    _cosines[grid](
        k_buffer, slots, directions, importance, cosine_sums, span.starts, mass.stride(0), k_buffer.stride(0),
        parts.entries, D=d, SHORTEST=SHORTEST, BLOCK=BLOCK, BLOCK_D=padded(d), num_warps=4,
    )  # fmt: skip
    _standings[grid](
        mass, importance, log_sums, cosine_sums, span.starts, mass.stride(0), parts.entries, FLOOR=MASS_FLOOR,
        POOL=POOL_ENTRIES, SMALLEST=SMALLEST_DEVIATION, UNLIKE=UNLIKE_FOR_ONE, BLOCK=STEP, num_warps=4,
    )  # fmt: skip
    return Scored(mass, importance)


@triton.jit
def _log(mass, entry, entries, FLOOR: tl.constexpr, POOL: tl.constexpr):
    """Logs of the mean attention to the neighborhoods of some entries of a request; ``mass`` is its first entry."""
    total = tl.zeros_like(entry).to(tl.float32)
    for place in tl.static_range(POOL):
        near = entry + place - POOL // 2
        total += tl.load(mass + near, mask=(entry < entries) & (near >= 0) & (near < entries), other=0.0)
    first = tl.maximum(entry - POOL // 2, 0)
    end = tl.minimum(entry + POOL // 2 + 1, entries)
    pooled = total / tl.maximum(end - first, 1).to(tl.float32)
    # As torch's clamp does, a comparison lets through what is not a number.
    return tl.log(tl.where(pooled < FLOOR, FLOOR, pooled))


@triton.jit
def _directions(
    k, slots, entry, inside, group, k_stride, D: tl.constexpr, SHORTEST: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Some keys of a head, scaled to length one; 0 beyond the end."""
    column = tl.arange(0, BLOCK_D)
    slot = tl.load(slots + entry, mask=inside, other=0).to(tl.int64)
    at = k + slot[:, None] * k_stride + group * D + column[None, :]
    keys = tl.load(at, mask=inside[:, None] & (column < D)[None, :], other=0.0).to(tl.float32)
    return keys / tl.maximum(tl.sqrt(tl.sum(keys * keys, 1)), SHORTEST)[:, None]


@triton.jit(do_not_specialize=["part_entries", "mass_stride"])
def _standing_sums(
    mass, k, slots, log_sums, directions, span_starts, mass_stride, k_stride, part_entries, D: tl.constexpr,
    FLOOR: tl.constexpr, POOL: tl.constexpr, SHORTEST: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    part, group, job = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(span_starts + job)
    entries = tl.load(span_starts + job + 1) - start
    first = part * part_entries
    if first < entries:
        own_mass = mass + group.to(tl.int64) * mass_stride + start
        end = tl.minimum(first + part_entries, entries)
        logs, squares, column = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.arange(0, BLOCK_D)
        total = tl.zeros([BLOCK_D], tl.float32)
        for tile in range(first, end, BLOCK):
            entry = tile + tl.arange(0, BLOCK)
            inside = entry < end
            log = tl.where(inside, _log(own_mass, entry, entries, FLOOR, POOL), 0.0)
            logs += log
            squares += log * log
            total += tl.sum(_directions(k, slots + start, entry, inside, group, k_stride, D, SHORTEST, BLOCK_D), 0)
        at = (group * tl.num_programs(2) + job) * tl.num_programs(0) + part
        second = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
        tl.store(log_sums + at, tl.sum(logs, 0))
        tl.store(log_sums + second + at, tl.sum(squares, 0))
        tl.store(directions + at * D + column, total, mask=column < D)


@triton.jit(do_not_specialize=["part_entries", "mass_stride"])
def _cosines(
    k, slots, directions, cosines, cosine_sums, span_starts, mass_stride, k_stride, part_entries, D: tl.constexpr,
    SHORTEST: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    part, group, job = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(span_starts + job)
    entries = tl.load(span_starts + job + 1) - start
    first = part * part_entries
    if first < entries:
        row, column = (group * tl.num_programs(2) + job) * tl.num_programs(0), tl.arange(0, BLOCK_D)
        anchor = tl.zeros([BLOCK_D], tl.float32)
        for other in range(0, tl.cdiv(entries, part_entries)):
            anchor += tl.load(directions + (row + other) * D + column, mask=column < D, other=0.0)
        anchor = anchor / entries
        mean = tl.sqrt(tl.sum(anchor * anchor, 0))  # of all cosines, but for rounding
        anchor = anchor / tl.maximum(mean, SHORTEST)
        own = cosines + group.to(tl.int64) * mass_stride + start
        end = tl.minimum(first + part_entries, entries)
        total, squares = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        for tile in range(first, end, BLOCK):
            entry = tile + tl.arange(0, BLOCK)
            inside = entry < end
            keys = _directions(k, slots + start, entry, inside, group, k_stride, D, SHORTEST, BLOCK_D)
            cosine = tl.where(inside, tl.sum(keys * anchor[None, :], 1) - mean, 0.0)
            tl.store(own + entry, cosine, mask=inside)
            total += cosine
            squares += cosine * cosine
        second = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
        tl.store(cosine_sums + row + part, tl.sum(total, 0))
        tl.store(cosine_sums + second + row + part, tl.sum(squares, 0))


@triton.jit
def _above(values, sums, second, parts, entries, SMALLEST: tl.constexpr):
    """The share of the normal distribution of all a row's values that lies above each of some."""
    mean = sum_of_parts(sums, parts) / entries
    variance = sum_of_parts(sums + second, parts) / entries - mean * mean
    deviation = tl.maximum(tl.sqrt(tl.maximum(variance, 0.0)), SMALLEST)
    return 0.5 - 0.5 * tl.erf((values - mean) / deviation * 0.7071067811865476)


@triton.jit(do_not_specialize=["part_entries", "mass_stride"])
def _standings(
    mass, importance, log_sums, cosine_sums, span_starts, mass_stride, part_entries, FLOOR: tl.constexpr,
    POOL: tl.constexpr, SMALLEST: tl.constexpr, UNLIKE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    part, group, job = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(span_starts + job)
    entries = tl.load(span_starts + job + 1) - start
    first = part * part_entries
    if first < entries:
        row = (group * tl.num_programs(2) + job) * tl.num_programs(0)
        second = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
        parts = tl.cdiv(entries, part_entries)
        own = group.to(tl.int64) * mass_stride + start
        end = tl.minimum(first + part_entries, entries)
        for tile in range(first, end, BLOCK):
            entry = tile + tl.arange(0, BLOCK)
            inside = entry < end
            log = _log(mass + own, entry, entries, FLOOR, POOL)
            attended = _above(log, log_sums + row, second, parts, entries, SMALLEST)
            cosine = tl.load(importance + own + entry, mask=inside, other=0.0)
            unlike = 1.0 - _above(cosine, cosine_sums + row, second, parts, entries, SMALLEST)
            tl.store(importance + own + entry, 1.0 - tl.minimum(UNLIKE * attended, unlike), mask=inside)
