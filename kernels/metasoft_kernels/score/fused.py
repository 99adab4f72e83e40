"""Importance in one pass over K: logits, exponentials and their sum over the probe's rows stay in registers."""

import torch
import triton
import triton.language as tl

from metasoft_kernels.ragged import Ragged
from metasoft_kernels.tiles import PRECISION, cdiv, operand_type, padded, rows_for


def importance(
    q: torch.Tensor,
    k_buffer: torch.Tensor,
    slots: torch.Tensor,
    lse: torch.Tensor,
    probe: Ragged,
    span: Ragged,
    scale: float,
    k_scale: float = 1.0,
) -> torch.Tensor:
    """:func:`metasoft_kernels.score.naive.importance` for all requests at once.

    Args:
        q: ``[sum t, H, d]``.
        k_buffer: ``[slots, G, d]`` one layer of the pool.
        slots: ``[sum S]`` slots of the spans.
        lse: ``[sum t, H]`` float32.
        probe, span: the requests' rows in ``q`` and in ``slots``.

    Returns:
        ``[G, sum S]`` float32.
    """
    heads, d = q.shape[1:]
    groups = k_buffer.shape[1]
    out = torch.empty(groups, span.total, dtype=torch.float32, device=q.device)
    block_entries = rows_for(d, q.dtype)
    block_rows = min(rows_for(d, q.dtype), padded(probe.longest * (heads // groups)))
    grid = (cdiv(span.longest, block_entries), groups, span.num_requests)
    _importance[grid](
        q, k_buffer, slots, lse, out, probe.starts, span.starts, q.stride(0), k_buffer.stride(0), out.stride(0),
        scale * k_scale, HEADS=heads, R=heads // groups, D=d, BLOCK_S=block_entries, BLOCK_M=block_rows,
        BLOCK_D=padded(d), OPERAND=operand_type(q.dtype), PRECISION=PRECISION,
        num_warps=8 if block_entries * block_rows > 8192 else 4, num_stages=2,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["out_stride"])
def _importance(
    q, k, slots, lse, out, probe_starts, span_starts, q_stride, k_stride, out_stride, scale,
    HEADS: tl.constexpr, R: tl.constexpr, D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, group, job = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    span_end = tl.load(span_starts + job + 1)
    first = tl.load(span_starts + job) + tile * BLOCK_S
    if first < span_end:
        probe_start = tl.load(probe_starts + job)
        rows = (tl.load(probe_starts + job + 1) - probe_start) * R
        entry = first + tl.arange(0, BLOCK_S)
        column = tl.arange(0, BLOCK_D)
        slot = tl.load(slots + entry, mask=entry < span_end, other=0).to(tl.int64)
        keys = tl.load(
            k + slot[:, None] * k_stride + group * D + column[None, :],
            mask=(entry < span_end)[:, None] & (column < D)[None, :],
            other=0.0,
        ).to(OPERAND)
        total = tl.zeros([BLOCK_S], tl.float32)
        for first_row in range(0, rows, BLOCK_M):
            row = first_row + tl.arange(0, BLOCK_M)
            token, head = (probe_start + row // R).to(tl.int64), group * R + row % R
            queries = tl.load(
                q + token[:, None] * q_stride + head[:, None] * D + column[None, :],
                mask=(row < rows)[:, None] & (column < D)[None, :],
                other=0.0,
            ).to(OPERAND)
            norm = tl.load(lse + token * HEADS + head, mask=row < rows, other=float("inf"))
            logits = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
            total += tl.sum(tl.exp(logits - norm[:, None]), 0)
        tl.store(out + group.to(tl.int64) * out_stride + entry, total / rows, mask=entry < span_end)
