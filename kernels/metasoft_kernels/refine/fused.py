"""The entry scorer over K and V where they lie: no row of features leaves the chip.

Two of the features are less their mean over the span, so a first kernel sums their logs part by part; a second one
walks each part, a tile of entries at a time, through the perceptron, and notes the largest log and the softmax's sum of
its part. Products are float32 on float32, as on a CPU.
"""

import torch
import triton
import triton.language as tl

from metasoft_kernels.parts import STEP, Scored, cut, sum_of_parts
from metasoft_kernels.ragged import Ragged
from metasoft_kernels.refine.naive import MASS_FLOOR, POOL_ENTRIES, Weights
from metasoft_kernels.tiles import PRECISION, padded

BLOCK = 32  # entries whose hidden layer is in registers at a time


def log_importance(
    mass: torch.Tensor,
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
    slots: torch.Tensor,
    weights: Weights,
    modes: torch.Tensor,
    layer: int,
    first_head: int,
    span: Ragged,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Scored:
    """:func:`metasoft_kernels.refine.naive.log_importance` for all requests at once.

    Args:
        mass: ``[G, sum S]`` float32 attention of the probe.
        k_buffer, v_buffer: ``[slots, G, d]`` one layer of the pool.
        slots: ``[sum S]`` slots of the spans.
        weights: contiguous.
        modes: ``[J]`` int32, each request's.
        layer, first_head: which of the weights are those of the buffers' first KV head.
        span: the requests' rows in ``slots``.
        k_scale, v_scale: what quantized pool entries are multiplied by on reading.

    Returns:
        The attention, the logs, and of each part the largest log and the softmax's sum.
    """
    groups, d = k_buffer.shape[1:]
    width = weights.out.shape[-1]
    parts = cut(span, groups)
    shape = (2, groups, span.num_requests, parts.number)
    log_sums, sums = (torch.empty(shape, dtype=torch.float32, device=mass.device) for _ in range(2))
    logs = torch.empty_like(mass)
    grid = (parts.number, groups, span.num_requests)
    _log_sums[grid](
        mass, log_sums, span.starts, mass.stride(0), parts.entries, FLOOR=MASS_FLOOR, POOL=POOL_ENTRIES, BLOCK=STEP,
        num_warps=4,
    )  # fmt: skip
    _log_importance[grid](
        mass, k_buffer, v_buffer, slots, *weights, modes, log_sums, logs, sums, span.starts, mass.stride(0),
        k_buffer.stride(0), v_buffer.stride(0), parts.entries, weights.out.shape[1], weights.out.shape[2], layer,
        first_head, k_scale, v_scale, D=d, W=width, FLOOR=MASS_FLOOR, POOL=POOL_ENTRIES, BLOCK=BLOCK,
        BLOCK_D=padded(d), BLOCK_H=padded(d // 2), BLOCK_W=padded(width), PRECISION=PRECISION, num_warps=4,
        num_stages=1,
    )  # fmt: skip
    return Scored(mass, logs, sums, parts)


@triton.jit
def _logs(mass, entry, entries, FLOOR: tl.constexpr, POOL: tl.constexpr):
    """Logs of the attention to some entries of a request and to their neighbourhood; ``mass`` is its first entry."""
    inside = entry < entries
    total = tl.zeros_like(entry).to(tl.float32)
    for place in tl.static_range(POOL):
        near = entry + place - POOL // 2
        total += tl.load(mass + near, mask=inside & (near >= 0) & (near < entries), other=0.0)
    first = tl.maximum(entry - POOL // 2, 0)
    end = tl.minimum(entry + POOL // 2 + 1, entries)
    own = tl.load(mass + entry, mask=inside, other=1.0)
    pooled = total / tl.maximum(end - first, 1).to(tl.float32)
    # As torch's clamp does, a comparison lets through what is not a number.
    own = tl.where(own < FLOOR, FLOOR, own)
    pooled = tl.where(pooled < FLOOR, FLOOR, pooled)
    return tl.log(own), tl.log(pooled)


@triton.jit(do_not_specialize=["part_entries", "mass_stride"])
def _log_sums(
    mass, log_sums, span_starts, mass_stride, part_entries, FLOOR: tl.constexpr, POOL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    part, group, job = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(span_starts + job)
    entries = tl.load(span_starts + job + 1) - start
    first = part * part_entries
    if first < entries:
        own_mass = mass + group.to(tl.int64) * mass_stride + start
        end = tl.minimum(first + part_entries, entries)
        own, pooled = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        for tile in range(first, end, BLOCK):
            entry = tile + tl.arange(0, BLOCK)
            log_own, log_pooled = _logs(own_mass, entry, entries, FLOOR, POOL)
            own += tl.where(entry < end, log_own, 0.0)
            pooled += tl.where(entry < end, log_pooled, 0.0)
        at = (group * tl.num_programs(2) + job) * tl.num_programs(0) + part
        tl.store(log_sums + at, tl.sum(own, 0))
        second = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
        tl.store(log_sums + second + at, tl.sum(pooled, 0))


@triton.jit(do_not_specialize=["mass_stride", "part_entries", "layers", "heads", "layer", "first_head"])
def _log_importance(
    mass, k, v, slots, hidden, hidden_bias, out, trust, neighbours, modes, log_sums, logs, sums, span_starts,
    mass_stride, k_stride, v_stride, part_entries, layers, heads, layer, first_head, k_scale, v_scale, D: tl.constexpr,
    W: tl.constexpr, FLOOR: tl.constexpr, POOL: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    part, group, job = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(span_starts + job)
    entries = tl.load(span_starts + job + 1) - start
    first = part * part_entries
    if first < entries:
        HALF: tl.constexpr = D // 2
        row = (group * tl.num_programs(2) + job) * tl.num_programs(0)
        second = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
        parts = tl.cdiv(entries, part_entries)
        own_mean = sum_of_parts(log_sums + row, parts) / entries
        pooled_mean = sum_of_parts(log_sums + second + row, parts) / entries
        head = ((tl.load(modes + job) * layers + layer) * heads + first_head + group).to(tl.int64)
        column, pair, unit = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_W)
        is_unit = unit < W
        matrix = hidden + head * ((D + HALF + 2) * W)
        of_values = tl.load(
            matrix + column[:, None] * W + unit[None, :], mask=(column < D)[:, None] & is_unit[None, :], other=0.0
        )
        of_pairs = tl.load(
            matrix + (D + pair)[:, None] * W + unit[None, :],
            mask=(pair < HALF)[:, None] & is_unit[None, :],
            other=0.0,
        )
        of_mass = tl.load(matrix + (D + HALF) * W + unit, mask=is_unit, other=0.0)
        of_pooled = tl.load(matrix + (D + HALF + 1) * W + unit, mask=is_unit, other=0.0)
        bias = tl.load(hidden_bias + head * W + unit, mask=is_unit, other=0.0)
        outward = tl.load(out + head * W + unit, mask=is_unit, other=0.0)
        trusted, near = tl.load(trust + head), tl.load(neighbours + head)
        own_mass = mass + group.to(tl.int64) * mass_stride + start
        end = tl.minimum(first + part_entries, entries)
        top, total = float("-inf"), 0.0
        for tile in range(first, end, BLOCK):
            entry = tile + tl.arange(0, BLOCK)
            inside = entry < end
            slot = tl.load(slots + start + entry, mask=inside, other=0).to(tl.int64)
            mask = inside[:, None] & (pair < HALF)[None, :]
            keys = k + slot[:, None] * k_stride + group * D + pair[None, :]
            one = tl.load(keys, mask=mask, other=0.0).to(tl.float32) * k_scale
            other = tl.load(keys + HALF, mask=mask, other=0.0).to(tl.float32) * k_scale
            values = tl.load(
                v + slot[:, None] * v_stride + group * D + column[None, :],
                mask=inside[:, None] & (column < D)[None, :],
                other=0.0,
            ).to(tl.float32)
            layer_in = tl.dot(values * v_scale, of_values, input_precision=PRECISION)
            layer_in = tl.dot(tl.sqrt(one * one + other * other), of_pairs, layer_in, input_precision=PRECISION)
            log_own, log_pooled = _logs(own_mass, entry, entries, FLOOR, POOL)
            log_own, log_pooled = log_own - own_mean, log_pooled - pooled_mean
            layer_in += log_own[:, None] * of_mass[None, :] + log_pooled[:, None] * of_pooled[None, :] + bias[None, :]
            active = layer_in * tl.sigmoid(layer_in)
            log = trusted * log_own + near * log_pooled + tl.sum(active * outward[None, :], 1)
            tl.store(logs + group.to(tl.int64) * mass_stride + start + entry, log, mask=inside)
            new_top = tl.maximum(top, tl.max(tl.where(inside, log, float("-inf")), 0))
            total = total * tl.exp(top - new_top) + tl.sum(tl.where(inside, tl.exp(log - new_top), 0.0), 0)
            top = new_top
        tl.store(sums + row + part, top)
        tl.store(sums + second + row + part, total)
