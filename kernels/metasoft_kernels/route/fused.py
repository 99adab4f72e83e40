"""Routing without an affinity matrix: a tile of dropped entries walks the kept keys and holds its best targets.

k·kᵀ runs on tensor cores. Of each tile of products only those above the row's m-th best so far matter; in most tiles
there are few, so the tile is searched again only as long as some row finds one. Equal affinities go to the earlier
entry; nothing depends on the order in which programs run. With a band the walk begins and ends near the tile's own
place in the prompt.
"""

import torch
import triton
import triton.language as tl

from metasoft_kernels.ragged import Ragged
from metasoft_kernels.tiles import PRECISION, cdiv, next_power_of_2, operand_type, padded, rows_for

UNROLLED = tl.constexpr(8)


def route(
    k_buffer: torch.Tensor,
    slots: torch.Tensor,
    kept_rows: torch.Tensor,
    dropped_rows: torch.Tensor,
    kept: Ragged,
    dropped: Ragged,
    targets: int,
    scale: float,
    dtype: torch.dtype,
    band: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`metasoft_kernels.route.naive.route` for all requests at once.

    Args:
        k_buffer: ``[slots, G, d]`` one layer of the pool.
        slots: ``[sum S]`` slots of the spans.
        kept_rows, dropped_rows: ``[G, sum B]``, ``[G, sum N]`` int32 entries on the span axis.
        kept, dropped: the requests' rows on those axes.
        targets: m.
        scale: factor on the affinity, the key scale's square included.
        dtype: what products are computed in.
        band: kept entries of the request, the nearest in position, among which a dropped one finds its targets; None:
            all.

    Returns:
        ``[G, sum N, m]`` int32 positions on the kept axis, ``sum B`` where a request keeps fewer than m entries or has
        no finite affinity, and ``[G, sum N, m]`` float32 weights, 0 there.
    """
    groups, d = k_buffer.shape[1:]
    shape = (groups, dropped.total, targets)
    target = torch.empty(shape, dtype=torch.int32, device=k_buffer.device)
    weight = torch.empty(shape, dtype=torch.float32, device=k_buffer.device)
    block_rows, block_kept = rows_for(d, dtype, most=64), rows_for(d, dtype)
    width = min(band or kept.longest, kept.longest)
    _route[(cdiv(dropped.longest, block_rows), groups, dropped.num_requests)](
        k_buffer, slots, kept_rows, dropped_rows, target, weight, kept.starts, dropped.starts, kept.total,
        dropped.total, k_buffer.stride(0), scale, width, IS_BANDED=width < kept.longest, D=d,
        M=targets, BLOCK_R=block_rows, BLOCK_K=block_kept, BLOCK_D=padded(d), BLOCK_M=next_power_of_2(targets),
        OPERAND=operand_type(dtype), PRECISION=PRECISION,
        num_warps=8 if block_rows * block_kept > 8192 else 4, num_stages=3 if dtype.itemsize == 2 else 1,
    )  # fmt: skip
    return target, weight


@triton.jit(do_not_specialize=["kept_total", "dropped_total", "band"])
def _route(
    k, slots, kept_rows, dropped_rows, target, weight, kept_starts, dropped_starts, kept_total, dropped_total, k_stride,
    scale, band, IS_BANDED: tl.constexpr, D: tl.constexpr, M: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, group, job = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    end = tl.load(dropped_starts + job + 1)
    first = tl.load(dropped_starts + job) + tile * BLOCK_R
    if first < end:
        row, column, rank = first + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_M)
        inside, real = row < end, column < D
        at = group.to(tl.int64) * dropped_total + row
        entry = tl.load(dropped_rows + at, mask=inside, other=0)
        slot = tl.load(slots + entry, mask=inside, other=0).to(tl.int64)
        keys = tl.load(
            k + slot[:, None] * k_stride + group * D + column[None, :], mask=inside[:, None] & real[None, :], other=0.0
        ).to(OPERAND)
        kept_begin, kept_end = tl.load(kept_starts + job), tl.load(kept_starts + job + 1)
        walk_begin, walk_end = kept_begin, kept_end
        if IS_BANDED:
            # Of the entries before this one on the axis of spans, `row` are dropped: the others are kept.
            near_begin = tl.maximum(tl.minimum(entry - row - band // 2, kept_end - band), kept_begin)
            near_end = tl.minimum(near_begin + band, kept_end)
            walk_begin = tl.min(tl.where(inside, near_begin, kept_end), 0)
            walk_end = tl.max(tl.where(inside, near_end, kept_begin), 0)
        # A place without an entry has a negative position; ranks from M on are padding that nothing enters.
        best = tl.where(rank[None, :] < M, float("-inf"), float("inf")) + tl.zeros([BLOCK_R, BLOCK_M], tl.float32)
        best_at = tl.zeros([BLOCK_R, BLOCK_M], tl.int32) - 1 - rank[None, :]
        for kept_first in range(walk_begin, walk_end, BLOCK_K):
            position = kept_first + tl.arange(0, BLOCK_K)
            is_kept = position < kept_end
            kept_entry = tl.load(kept_rows + group.to(tl.int64) * kept_total + position, mask=is_kept, other=0)
            kept_slot = tl.load(slots + kept_entry, mask=is_kept, other=0).to(tl.int64)
            kept_keys = tl.load(
                k + kept_slot[:, None] * k_stride + group * D + column[None, :],
                mask=is_kept[:, None] & real[None, :],
                other=0.0,
            ).to(OPERAND)
            affinity = tl.dot(keys, tl.trans(kept_keys), input_precision=PRECISION)
            if IS_BANDED:
                is_near = (position[None, :] >= near_begin[:, None]) & (position[None, :] < near_end[:, None])
                affinity = tl.where(is_near, affinity, float("-inf"))
            else:
                affinity = tl.where(is_kept[None, :], affinity, float("-inf"))
            bar, top = tl.min(best, 1), tl.max(affinity, 1)
            if M <= UNROLLED:  # a loop inside would keep the compiler from loading the next keys meanwhile
                for _ in tl.static_range(M):
                    if tl.max((top > bar).to(tl.int32), 0) > 0:
                        affinity, best, best_at, bar, top = _enter(affinity, position, best, best_at, bar, top)
            else:
                while tl.max((top > bar).to(tl.int32), 0) > 0:
                    affinity, best, best_at, bar, top = _enter(affinity, position, best, best_at, bar, top)
        is_target = best_at >= 0
        highest = tl.max(tl.where(is_target, best, float("-inf")), 1)
        mass = tl.where(is_target, tl.exp((best - highest[:, None]) * scale), 0.0)
        share = mass / tl.maximum(tl.sum(mass, 1), 1e-30)[:, None]
        cell = at[:, None] * M + rank[None, :]
        mask = inside[:, None] & (rank < M)[None, :]
        tl.store(target + cell, tl.where(is_target, best_at, kept_total), mask=mask)
        tl.store(weight + cell, share, mask=mask)


@triton.jit
def _enter(affinity, position, best, best_at, bar, top):
    """Let each row's largest affinity replace its worst target, if it is larger; and take it out of the tile."""
    enters = (top > bar)[:, None]
    # Of equal ones the earliest position enters, and the latest leaves.
    top_at = tl.min(tl.where(affinity == top[:, None], position[None, :], 2147483647), 1)
    leaves_at = tl.max(tl.where(best == bar[:, None], best_at, -2147483648), 1)
    place = enters & (best == bar[:, None]) & (best_at == leaves_at[:, None])
    best = tl.where(place, top[:, None], best)
    best_at = tl.where(place, top_at[:, None], best_at)
    affinity = tl.where(enters & (position[None, :] == top_at[:, None]), float("-inf"), affinity)
    return affinity, best, best_at, tl.min(best, 1), tl.max(affinity, 1)
