"""Probe attention, split over the prompt: each program holds the rows of one KV head and walks a part of its slots.

The r query heads of a KV head times the t probe tokens are rows of one product, so K and V are read once per block of
rows. A second kernel merges the parts by their log-sum-exp (as FlashAttention's split-KV decoding does); the probe's
own tokens, seen causally, are one more part.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from metasoft_kernels.ragged import Ragged
from metasoft_kernels.tiles import PRECISION, cdiv, operand_type, padded, rows_for

# Enough programs to fill a large GPU twice, in parts long enough to be worth their scratch memory.
PROGRAMS = 264
SHORTEST_PART = 512
MERGED_ROWS = 8


def attend(
    q: torch.Tensor,
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
    slots: torch.Tensor,
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    probe: Ragged,
    context: Ragged,
    scale: float,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    window: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`metasoft_kernels.probe.naive.attend` for all requests at once.

    Args:
        q: ``[sum t, H, d]``; k_new, v_new: ``[sum t, G, d]``.
        k_buffer, v_buffer: ``[slots, G, d]`` one layer of the pool.
        slots: ``[sum C]`` what each request's probe sees; in a window its last entries are enough.
        probe, context: the requests' rows in ``q`` and in ``slots``.

    Returns:
        ``[sum t, H, d]`` in ``q``'s dtype, and ``[sum t, H]`` float32.
    """
    groups = k_buffer.shape[1]
    blocks = cdiv(probe.longest * (q.shape[1] // groups), _block_rows(q, probe, groups))
    parts, part_tokens = _cut(context.lengths, blocks * groups)
    scratch = _scratch(q, parts)
    launch_parts(
        scratch, q, k_buffer, v_buffer, slots, k_new, v_new, probe, context, scale, k_scale, v_scale, parts,
        part_tokens, window,
    )  # fmt: skip
    return merge_parts(q, scratch, probe, context.starts, part_tokens)


def _cut(contexts: Sequence[int], programs: int) -> tuple[int, int]:
    """Parts of the longest context, and tokens of a part, if one part of all requests takes so many programs."""
    wanted = cdiv(PROGRAMS, programs * len(contexts))
    part_tokens = max(SHORTEST_PART, cdiv(cdiv(max(contexts), wanted), 128) * 128)
    return cdiv(max(contexts), part_tokens), part_tokens


def scratch_bytes(probes: Sequence[int], contexts: Sequence[int], heads: int, groups: int, d: int) -> int:
    """At most that much memory :func:`attend` takes beside its result.

    Args:
        probes, contexts: of each request its probe's tokens and the entries that they see.
        heads, groups, d: query heads, KV heads and their size.
    """
    parts, _ = _cut(contexts, groups)
    return (parts + 1) * sum(probes) * heads * (d + 1) * 4


def merge_with_self(
    q: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    probe: Ragged,
    scale: float,
    lse_scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add the probe's own tokens, seen causally, to attention over the prompt that another kernel has computed.

    Args:
        out, lse: ``[sum t, H, d]`` and ``[sum t, H]`` over the prompt, contiguous.
        lse_scale: what makes natural logarithms of them.

    Returns:
        As :func:`attend`.
    """
    heads, d = q.shape[1:]
    groups = k_new.shape[1]
    whole, whole_lse = torch.empty_like(out), torch.empty_like(lse)
    block_rows = _block_rows(q, probe, groups)
    _attend_own[(cdiv(probe.longest * (heads // groups), block_rows), groups, probe.num_requests)](
        q, k_new, v_new, out, lse, whole, whole_lse, probe.starts, q.stride(0), k_new.stride(0), v_new.stride(0),
        lse_scale, scale, HEADS=heads, R=heads // groups, D=d, BLOCK_M=block_rows,
        BLOCK_N=rows_for(d, q.dtype, most=64), BLOCK_D=padded(d), OPERAND=operand_type(q.dtype), PRECISION=PRECISION,
        num_warps=8 if block_rows * padded(d) > 8192 else 4, num_stages=2,
    )  # fmt: skip
    return whole, whole_lse


def _block_rows(q: torch.Tensor, probe: Ragged, groups: int) -> int:
    return min(rows_for(q.shape[2], q.dtype), padded(probe.longest * (q.shape[1] // groups)))


def _scratch(q: torch.Tensor, parts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of each part; the last is the probe's own tokens."""
    tokens, heads, d = q.shape
    options = {"dtype": torch.float32, "device": q.device}
    return torch.empty(parts + 1, tokens, heads, d, **options), torch.empty(parts + 1, tokens, heads, **options)


def launch_parts(
    scratch, q, k_buffer, v_buffer, slots, k_new, v_new, probe, context, scale, k_scale, v_scale, parts, part_tokens,
    window=None,
) -> None:  # fmt: skip
    """Fill the first ``parts`` parts of the scratch memory from the pool, and the last from the probe's own tokens."""
    heads, d = q.shape[1:]
    groups = k_buffer.shape[1]
    block_rows = _block_rows(q, probe, groups)
    block_entries = rows_for(d, q.dtype, most=64)
    blocks = cdiv(probe.longest * (heads // groups), block_rows)
    out, lse = scratch
    _attend_part[(blocks * (parts + 1), groups, probe.num_requests)](
        q, k_buffer, v_buffer, slots, k_new, v_new, out, lse, probe.starts, context.starts, q.stride(0),
        k_buffer.stride(0), v_buffer.stride(0), k_new.stride(0), v_new.stride(0), out.stride(0), lse.stride(0), parts,
        out.shape[0] - 1, part_tokens, scale, k_scale, v_scale, window or 0, HEADS=heads, R=heads // groups, D=d,
        BLOCK_M=block_rows, BLOCK_N=block_entries, BLOCK_D=padded(d), OPERAND=operand_type(q.dtype),
        PRECISION=PRECISION, HAS_WINDOW=window is not None, num_warps=8 if block_rows * padded(d) > 8192 else 4,
        num_stages=2,
    )  # fmt: skip


def merge_parts(q, scratch, probe, context_starts, part_tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge what :func:`launch_parts` computed."""
    part_out, part_lse = scratch
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    _merge_parts[(cdiv(probe.longest * q.shape[1], MERGED_ROWS), probe.num_requests)](
        part_out, part_lse, out, lse, probe.starts, context_starts, part_out.stride(0), part_lse.stride(0),
        part_out.shape[0] - 1, part_tokens, HEADS=q.shape[1], D=q.shape[2], BLOCK_R=MERGED_ROWS,
        BLOCK_D=padded(q.shape[2]), num_warps=4,
    )  # fmt: skip
    return out, lse


@triton.jit(do_not_specialize=["parts", "own_part", "lse_stride", "window"])
def _attend_part(
    q, k, v, slots, k_new, v_new, part_out, part_lse, probe_starts, context_starts, q_stride, k_stride, v_stride,
    k_new_stride, v_new_stride, out_stride, lse_stride, parts, own_part, part_tokens, scale, k_scale, v_scale,
    window, HEADS: tl.constexpr, R: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    part, block = tl.program_id(0) % (parts + 1), tl.program_id(0) // (parts + 1)
    group, job = tl.program_id(1), tl.program_id(2)
    probe_start = tl.load(probe_starts + job)
    tokens = tl.load(probe_starts + job + 1) - probe_start
    context_start = tl.load(context_starts + job)
    context = tl.load(context_starts + job + 1) - context_start
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_D)
    inside, real = row < tokens * R, column < D
    token, head = row // R, group * R + row % R
    at = (probe_start + token).to(tl.int64) * HEADS + head
    is_own = part == parts
    if (block * BLOCK_M < tokens * R) & (is_own | (part * part_tokens < context)):
        queries = tl.load(
            q + (probe_start + token).to(tl.int64)[:, None] * q_stride + head[:, None] * D + column[None, :],
            mask=inside[:, None] & real[None, :],
            other=0.0,
        ).to(OPERAND)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        if is_own:
            for first in range(0, tokens, BLOCK_N):
                entry = first + tl.arange(0, BLOCK_N)
                where = (probe_start + entry).to(tl.int64)[:, None]
                mask = (entry < tokens)[:, None] & real[None, :]
                offset = group * D + column[None, :]
                keys = tl.load(k_new + where * k_new_stride + offset, mask=mask, other=0.0).to(OPERAND)
                values = tl.load(v_new + where * v_new_stride + offset, mask=mask, other=0.0).to(OPERAND)
                seen = (entry[None, :] <= token[:, None]) & (entry < tokens)[None, :]
                if HAS_WINDOW:
                    seen &= entry[None, :] > token[:, None] - window
                top, total, acc = _step(
                    queries, keys, values, seen, scale, top, total, acc, OPERAND, PRECISION, HAS_WINDOW
                )
        else:
            end = tl.minimum(context, (part + 1) * part_tokens)
            for first in range(part * part_tokens, end, BLOCK_N):
                entry = first + tl.arange(0, BLOCK_N)
                slot = tl.load(slots + context_start + entry, mask=entry < end, other=0).to(tl.int64)[:, None]
                mask = (entry < end)[:, None] & real[None, :]
                offset = group * D + column[None, :]
                keys = tl.load(k + slot * k_stride + offset, mask=mask, other=0.0).to(OPERAND)
                values = tl.load(v + slot * v_stride + offset, mask=mask, other=0.0).to(OPERAND)
                seen = (entry < end)[None, :] & (row >= 0)[:, None]
                if HAS_WINDOW:
                    seen &= entry[None, :] > context + token[:, None] - window
                top, total, acc = _step(
                    queries, keys, values, seen, scale * k_scale, top, total, acc, OPERAND, PRECISION, HAS_WINDOW
                )
            acc *= v_scale
        if HAS_WINDOW:  # of this part a row may see nothing: its log-sum-exp stays minus infinity
            total = tl.where(total > 0, total, 1.0)
        stored = tl.where(is_own, own_part, part).to(tl.int64)
        out = acc / total[:, None]
        tl.store(
            part_out + stored * out_stride + at[:, None] * D + column[None, :],
            out,
            mask=inside[:, None] & real[None, :],
        )
        tl.store(part_lse + stored * lse_stride + at, top + tl.log(total), mask=inside)


@triton.jit
def _attend_own(
    q, k_new, v_new, out, lse, whole, whole_lse, probe_starts, q_stride, k_stride, v_stride, lse_scale, scale,
    HEADS: tl.constexpr, R: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The probe's own tokens on top of what has been seen already."""
    block, group, job = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    probe_start = tl.load(probe_starts + job)
    tokens = tl.load(probe_starts + job + 1) - probe_start
    if block * BLOCK_M < tokens * R:
        row, column = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
        inside, real = row < tokens * R, column < D
        token, head = row // R, group * R + row % R
        at = (probe_start + token).to(tl.int64) * HEADS + head
        cell, mask = at[:, None] * D + column[None, :], inside[:, None] & real[None, :]
        queries = tl.load(
            q + (probe_start + token).to(tl.int64)[:, None] * q_stride + head[:, None] * D + column[None, :],
            mask=mask,
            other=0.0,
        ).to(OPERAND)
        top = tl.load(lse + at, mask=inside, other=0.0) * lse_scale
        total = tl.full([BLOCK_M], 1.0, tl.float32)
        acc = tl.load(out + cell, mask=mask, other=0.0).to(tl.float32)
        for first in range(0, tokens, BLOCK_N):
            entry = first + tl.arange(0, BLOCK_N)
            where = (probe_start + entry).to(tl.int64)[:, None]
            own, offset = (entry < tokens)[:, None] & real[None, :], group * D + column[None, :]
            keys = tl.load(k_new + where * k_stride + offset, mask=own, other=0.0).to(OPERAND)
            values = tl.load(v_new + where * v_stride + offset, mask=own, other=0.0).to(OPERAND)
            seen = (entry[None, :] <= token[:, None]) & (entry < tokens)[None, :]
            top, total, acc = _step(queries, keys, values, seen, scale, top, total, acc, OPERAND, PRECISION, False)
        tl.store(whole + cell, acc / total[:, None], mask=mask)
        tl.store(whole_lse + at, top + tl.log(total), mask=inside)


@triton.jit
def _step(
    queries, keys, values, seen, scale, top, total, acc, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    logits = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
    logits = tl.where(seen, logits, float("-inf"))
    new_top = tl.maximum(top, tl.max(logits, 1))
    base = new_top
    if HAS_WINDOW:  # a row that has seen nothing yet
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
    decay = tl.exp(top - base)
    mass = tl.exp(logits - base[:, None])
    total = total * decay + tl.sum(mass, 1)
    acc = tl.dot(mass.to(OPERAND), values, acc * decay[:, None], input_precision=PRECISION)
    return new_top, total, acc


@triton.jit(do_not_specialize=["own_part", "out_stride", "lse_stride"])
def _merge_parts(
    part_out, part_lse, out, lse, probe_starts, context_starts, out_stride, lse_stride, own_part, part_tokens,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tile, job = tl.program_id(0), tl.program_id(1)
    end = tl.load(probe_starts + job + 1) * HEADS
    first = tl.load(probe_starts + job) * HEADS + tile * BLOCK_R
    if first < end:
        row, column = (first + tl.arange(0, BLOCK_R)).to(tl.int64), tl.arange(0, BLOCK_D)
        inside = row < end
        cell, mask = row[:, None] * D + column[None, :], inside[:, None] & (column < D)[None, :]
        parts = tl.cdiv(tl.load(context_starts + job + 1) - tl.load(context_starts + job), part_tokens)
        # Every token sees itself, so the last part is never empty.
        own = own_part.to(tl.int64)
        top = tl.load(part_lse + own * lse_stride + row, mask=inside, other=0.0)
        acc = tl.load(part_out + own * out_stride + cell, mask=mask, other=0.0)
        total = tl.full([BLOCK_R], 1.0, tl.float32)
        out_at, lse_at = part_out + cell, part_lse + row
        for _ in range(0, parts):
            part_top = tl.load(lse_at, mask=inside, other=0.0)
            state = tl.load(out_at, mask=mask, other=0.0)
            new_top = tl.maximum(top, part_top)
            decay, mass = tl.exp(top - new_top), tl.exp(part_top - new_top)
            total = total * decay + mass
            acc = acc * decay[:, None] + state * mass[:, None]
            top = new_top
            out_at += out_stride
            lse_at += lse_stride
        tl.store(out + cell, acc / total[:, None], mask=mask)
        tl.store(lse + row, top + tl.log(total), mask=inside)
