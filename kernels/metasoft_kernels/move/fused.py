"""Writing the consolidated entries, straight from pool to pool."""

import torch
import triton
import triton.language as tl

from metasoft_kernels.ragged import Ragged
from metasoft_kernels.tiles import cdiv, padded

BLOCK = 16
BIAS_OF_FLOAT32 = tl.constexpr(127)
EXPONENT_BITS = {torch.float8_e4m3fn: 4, torch.float8_e5m2: 5, torch.bfloat16: 8}  # where a kernel rounds itself


def move(
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
    slots: torch.Tensor,
    kept_rows: torch.Tensor,
    new_slots: torch.Tensor,
    values: torch.Tensor | None = None,
    v_scale: float = 1.0,
) -> None:
    """:func:`metasoft_kernels.move.naive.move` for all requests at once.

    Args:
        slots: ``[sum S]``; new_slots: ``[sum B]``.
        kept_rows: ``[G, sum B]`` int32 entries on the span axis.
        values: ``[sum B, G, d]``.
    """
    groups, d = k_buffer.shape[1:]
    count = new_slots.numel()
    if values is not None and values.dtype != v_buffer.dtype:
        # Torch's own rounding, which SGLang uses too; Triton's differs from GPU to GPU.
        values = (values / v_scale).to(v_buffer.dtype)
    bits = torch.uint8 if k_buffer.dtype.itemsize == 1 else k_buffer.dtype
    k_buffer, v_buffer = k_buffer.view(bits), v_buffer.view(bits)
    given = values is not None
    new_values = v_buffer if values is None else values.view(bits)
    _move[(cdiv(count, BLOCK), groups)](
        k_buffer, v_buffer, new_values, slots, kept_rows, new_slots, count,
        k_buffer.stride(0), v_buffer.stride(0), D=d, BLOCK=BLOCK, BLOCK_D=padded(d), GIVEN=given, num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def _move(
    keys, values, merged, slots, kept_rows, new_slots, count, k_stride, v_stride, D: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    kept = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = kept < count
    column = tl.arange(0, BLOCK_D)
    entry = tl.load(kept_rows + group.to(tl.int64) * count + kept, mask=inside, other=0)
    source = tl.load(slots + entry, mask=inside, other=0).to(tl.int64)[:, None]
    slot = tl.load(new_slots + kept, mask=inside, other=0).to(tl.int64)[:, None]
    mask, cell = inside[:, None] & (column < D)[None, :], group * D + column[None, :]
    tl.store(keys + slot * k_stride + cell, tl.load(keys + source * k_stride + cell, mask=mask), mask=mask)
    if GIVEN:
        value = tl.load(merged + kept.to(tl.int64)[:, None] * (tl.num_programs(1) * D) + cell, mask=mask)
    else:
        value = tl.load(values + source * v_stride + cell, mask=mask)
    tl.store(values + slot * v_stride + cell, value, mask=mask)


def move_biased(
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
    slots: torch.Tensor,
    kept_rows: torch.Tensor,
    new_slots: torch.Tensor,
    biases: torch.Tensor,
    directions: torch.Tensor,
    kept: Ragged,
    scale: float,
    k_scale: float = 1.0,
) -> None:
    """:func:`metasoft_kernels.move.naive.move_biased` for all requests at once.

    Args:
        slots: ``[sum S]``; new_slots: ``[sum B]``.
        kept_rows, biases: ``[G, sum B]`` int32 entries on the span axis, and float32.
        directions: ``[J, G, d]`` float32, each ``[d]`` contiguous.
        kept: the requests' rows on the kept axis.
        scale: factor on q·k; k_scale: what quantized pool entries are multiplied by on reading.
    """
    groups, d = k_buffer.shape[1:]
    exponent_bits = EXPONENT_BITS.get(k_buffer.dtype, 0)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[k_buffer.dtype.itemsize]
    key_bits = k_buffer.view(bits) if exponent_bits else k_buffer
    _move_biased[(cdiv(kept.longest, BLOCK), groups, kept.num_requests)](
        k_buffer, key_bits, v_buffer.view(bits), slots, kept_rows, new_slots, biases, directions,
        kept.starts, kept.total, k_buffer.stride(0), v_buffer.stride(0), directions.stride(0), directions.stride(1),
        scale, k_scale, D=d, BLOCK=BLOCK, BLOCK_D=padded(d), EXPONENT_BITS=exponent_bits, num_warps=4,
    )  # fmt: skip


@triton.jit
def to_float8(x, EXPONENT_BITS: tl.constexpr):
    """Bits of float32 numbers in float8 e4m3fn (4) or e5m2 (5), rounded to nearest, ties to even: as torch's cast.

    What is too large becomes the largest number in e4m3fn (of torch 2.14; of older ones NaN) and infinity in e5m2.
    Triton's own cast depends on the GPU.
    """
    MANTISSA: tl.constexpr = 7 - EXPONENT_BITS
    BIAS: tl.constexpr = 2 ** (EXPONENT_BITS - 1) - 1
    CUT: tl.constexpr = 23 - MANTISSA
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    odd = (magnitude >> CUT) & 1
    normal = (magnitude + ((1 << (CUT - 1)) - 1) + odd - ((127 - BIAS) << 23)) >> CUT
    # Below the smallest normal number the step is constant: adding a number whose own step it is rounds to it.
    step = tl.full(x.shape, (BIAS_OF_FLOAT32 + 1 - BIAS + CUT) << 23, tl.int32)
    small = (tl.abs(x) + step.to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True) - step
    result = tl.where(magnitude < ((128 - BIAS) << 23), small, normal)
    if EXPONENT_BITS == 4:
        result = tl.minimum(result, 0x7E)
    else:
        result = tl.minimum(result, 0x7C)
    result = tl.where(x == x, result, 0x7F)
    return (result | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def to_bfloat16(x):
    """Bits of float32 numbers in bfloat16, rounded to nearest, ties to even; the interpreter's own cast cuts off."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(x == x, rounded, 0x7FC0).to(tl.int16)


@triton.jit(do_not_specialize=["kept_total"])
def _move_biased(
    keys, key_bits, values, slots, kept_rows, new_slots, biases, directions, kept_starts, kept_total, k_stride,
    v_stride, job_stride, head_stride, scale, k_scale, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    EXPONENT_BITS: tl.constexpr,
):  # fmt: skip
    tile, group, job = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    end = tl.load(kept_starts + job + 1)
    first = tl.load(kept_starts + job) + tile * BLOCK
    if first < end:
        kept, column = first + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
        inside = kept < end
        row = group.to(tl.int64) * kept_total + kept
        entry = tl.load(kept_rows + row, mask=inside, other=0)
        source = tl.load(slots + entry, mask=inside, other=0).to(tl.int64)[:, None]
        slot = tl.load(new_slots + kept, mask=inside, other=0).to(tl.int64)[:, None]
        mask, cell = inside[:, None] & (column < D)[None, :], group * D + column[None, :]
        bias = tl.load(biases + row, mask=inside, other=0.0)
        along = tl.load(directions + job.to(tl.int64) * job_stride + group * head_stride + column, mask=column < D)
        key = tl.load(keys + source * k_stride + cell, mask=mask, other=0.0).to(tl.float32) * k_scale
        key = (key + bias[:, None] * (along / scale)[None, :]) / k_scale
        if EXPONENT_BITS == 8:
            tl.store(key_bits + slot * k_stride + cell, to_bfloat16(key), mask=mask)
        elif EXPONENT_BITS:
            tl.store(key_bits + slot * k_stride + cell, to_float8(key, EXPONENT_BITS), mask=mask)
        else:
            tl.store(keys + slot * k_stride + cell, key.to(keys.dtype.element_ty), mask=mask)
        tl.store(values + slot * v_stride + cell, tl.load(values + source * v_stride + cell, mask=mask), mask=mask)
