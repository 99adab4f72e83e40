"""Writing the consolidated entries, straight from pool to pool."""

import torch
import triton
import triton.language as tl

from metasoft_kernels.tiles import padded

BLOCK = 16


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
    _move[(triton.cdiv(count, BLOCK), groups)](
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
