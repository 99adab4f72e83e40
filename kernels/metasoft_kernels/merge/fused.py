"""Consolidation as a sum over sorted contributions: deterministic, without atomics and however unequal the loads.

Every (dropped entry, target) pair is one contribution. A stable sort by target makes each kept entry's contributions a
run, in the order of the dropped entries. Some kept entries take thousands, so runs are cut at fixed places: every CUT
contributions. One kernel sums what continues a run across a cut, one program per cut; the other sums each run up to its
first cut, adds those parts in order, and applies gate and update. Both always add in the same order.
"""

import torch
import triton
import triton.language as tl

from metasoft_kernels.merge.naive import LOAD_EPSILON
from metasoft_kernels.ragged import Ragged
from metasoft_kernels.tiles import cdiv, padded

CUT = 128
TINY = torch.finfo(torch.float32).tiny
LARGEST_GATE = 1 - torch.finfo(torch.float32).eps


def attention_flow(
    v_buffer: torch.Tensor,
    slots: torch.Tensor,
    importance: torch.Tensor,
    kept_rows: torch.Tensor,
    dropped_rows: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor,
    kept: Ragged,
    gate_scale: torch.Tensor,
    v_scale: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`metasoft_kernels.merge.naive.attention_flow` for all requests at once.

    Args:
        v_buffer: ``[slots, G, d]`` one layer of the pool.
        slots: ``[sum S]`` slots of the spans.
        importance: ``[G, sum S]`` float32.
        kept_rows, dropped_rows: ``[G, sum B]``, ``[G, sum N]`` int32 entries on the span axis.
        target, weight: ``[G, sum N, m]`` from the routing stage.
        kept: the requests' rows on the kept axis.
        gate_scale: ``[G]`` float32 factor on the gate.
        v_scale: what quantized pool entries are multiplied by on reading.
        dtype: of the result.

    Returns:
        ``[sum B, G, d]``; an entry whose merged value is not finite is as it was. And ``[G, sum B]`` bool: where the
        merged value was finite.
    """
    groups, d = v_buffer.shape[1:]
    head = torch.arange(groups, dtype=torch.int32, device=target.device)
    # One key per head and kept entry, and one per head for contributions that go nowhere.
    keys = (target + (head * (kept.total + 1)).view(-1, 1, 1)).flatten()
    sorted_keys, order = keys.sort(stable=True)
    bounds = torch.searchsorted(
        sorted_keys, torch.arange(groups * (kept.total + 1) + 1, dtype=torch.int32, device=keys.device), out_int32=True
    )
    cuts = cdiv(keys.numel(), CUT)
    options = {"dtype": torch.float32, "device": keys.device}
    carried, carried_mass = torch.empty(cuts, d, **options), torch.empty(cuts, 2, **options)
    merged = torch.empty(kept.total, groups, d, dtype=dtype, device=keys.device)
    is_finite = torch.empty(groups, kept.total, dtype=torch.bool, device=keys.device)
    sizes = {"D": d, "BLOCK": min(32, 4096 // padded(d)), "BLOCK_D": padded(d), "CUT": CUT, "num_warps": 4}
    contributions = (
        v_buffer, slots, importance, dropped_rows, weight, order, sorted_keys, bounds, dropped_rows.shape[1],
        target.shape[-1], kept.total, importance.stride(0), v_buffer.stride(0), v_scale,
    )  # fmt: skip
    _carry[(cuts,)](*contributions, carried, carried_mass, **sizes)
    _flow[(kept.total, groups)](
        *contributions, carried, carried_mass, kept_rows, gate_scale, merged, is_finite, EPSILON=LOAD_EPSILON,
        SMALLEST=TINY, LARGEST_GATE=LARGEST_GATE, **sizes,
    )  # fmt: skip
    return merged, is_finite


@triton.jit
def _sum(
    v, slots, importance, dropped_rows, weight, order, first, end, group, dropped_total, targets, importance_stride,
    v_stride, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Weighted values, weights, and weighted importance of the contributions from ``first`` up to ``end``."""
    column = tl.arange(0, BLOCK_D)
    flow = tl.zeros([BLOCK_D], tl.float32)
    load, moved = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(first, end, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < end
        pair = tl.load(order + place, mask=inside, other=0)
        row = group * dropped_total + (pair // targets) % dropped_total
        entry = tl.load(dropped_rows + row, mask=inside, other=0)
        slot = tl.load(slots + entry, mask=inside, other=0).to(tl.int64)
        share = tl.load(weight + pair, mask=inside, other=0.0)
        mass = tl.load(importance + group * importance_stride + entry, mask=inside, other=0.0)
        values = tl.load(
            v + slot[:, None] * v_stride + group * D + column[None, :],
            mask=inside[:, None] & (column < D)[None, :],
            other=0.0,
        ).to(tl.float32)
        flow += tl.sum(values * share[:, None], 0)
        load += share
        moved += share * mass
    return flow, tl.sum(load, 0), tl.sum(moved, 0)


@triton.jit(do_not_specialize=["dropped_total", "kept_total", "importance_stride"])
def _carry(
    v, slots, importance, dropped_rows, weight, order, sorted_keys, bounds, dropped_total, targets, kept_total,
    importance_stride, v_stride, v_scale, carried, carried_mass, D: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * CUT
    key = tl.load(sorted_keys + first)
    group, kept = (key // (kept_total + 1)).to(tl.int64), key % (kept_total + 1)
    if (kept < kept_total) & (tl.load(bounds + key) < first):
        end = tl.minimum(tl.load(bounds + key + 1), first + CUT)
        flow, load, moved = _sum(
            v, slots, importance, dropped_rows, weight, order, first, end, group, dropped_total, targets,
            importance_stride, v_stride, D, BLOCK, BLOCK_D,
        )  # fmt: skip
        cut, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_D)
        tl.store(carried + cut * D + column, flow, mask=column < D)
        tl.store(carried_mass + cut * 2, load)
        tl.store(carried_mass + cut * 2 + 1, moved)


@triton.jit(
    do_not_specialize=["dropped_total", "kept_total", "importance_stride"],
    do_not_specialize_on_alignment=["gate_scale"],  # a layer's
)
def _flow(
    v, slots, importance, dropped_rows, weight, order, sorted_keys, bounds, dropped_total, targets, kept_total,
    importance_stride, v_stride, v_scale, carried, carried_mass, kept_rows, gate_scale, merged, is_finite,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, CUT: tl.constexpr, EPSILON: tl.constexpr,
    SMALLEST: tl.constexpr, LARGEST_GATE: tl.constexpr,
):  # fmt: skip
    kept, group = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    key = group * (kept_total + 1) + kept
    first, end = tl.load(bounds + key), tl.load(bounds + key + 1)
    cut = first // CUT + 1
    flow, load, moved = _sum(
        v, slots, importance, dropped_rows, weight, order, first, tl.minimum(end, cut * CUT), group, dropped_total,
        targets, importance_stride, v_stride, D, BLOCK, BLOCK_D,
    )  # fmt: skip
    column, real = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_D) < D
    for some in range(cut, tl.cdiv(end, CUT), BLOCK):
        part = some + tl.arange(0, BLOCK)
        inside = part < tl.cdiv(end, CUT)
        part = part.to(tl.int64)
        parts = tl.load(carried + part[:, None] * D + column[None, :], mask=inside[:, None] & real[None, :], other=0.0)
        flow += tl.sum(parts, 0)
        load += tl.sum(tl.load(carried_mass + part * 2, mask=inside, other=0.0), 0)
        moved += tl.sum(tl.load(carried_mass + part * 2 + 1, mask=inside, other=0.0), 0)
    entry = tl.load(kept_rows + group * kept_total + kept)
    slot = tl.load(slots + entry).to(tl.int64)
    mass = tl.load(importance + group * importance_stride + entry)
    value = tl.load(v + slot * v_stride + group * D + column, mask=real, other=0.0).to(tl.float32) * v_scale
    gate = tl.load(gate_scale + group) * moved / tl.maximum(mass + moved, SMALLEST)
    gate = tl.minimum(tl.maximum(gate, 0.0), LARGEST_GATE)
    result = value + gate * (flow * v_scale / (load + EPSILON) - value)
    finite = tl.abs(result) < float("inf")
    out = merged + (kept * tl.num_programs(1) + group) * D + column
    tl.store(out, tl.where(finite, result, value), mask=real)
    tl.store(is_finite + group * kept_total + kept, tl.min((finite | (column >= D)).to(tl.int32), 0) > 0)
