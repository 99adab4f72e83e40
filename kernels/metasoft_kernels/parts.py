"""Requests cut into parts, one program each; what a part sums is added up by whoever needs it, always in one order."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from metasoft_kernels.ragged import Ragged
from metasoft_kernels.tiles import cdiv

PROGRAMS = 1056  # eight for each multiprocessor of a large GPU
STEP = 128  # entries of a part are a multiple of it
SUMMED = tl.constexpr(64)  # parts that are read at a time


class Parts(NamedTuple):
    """How an axis is cut."""

    entries: int  # of each part of a request but the last, a multiple of STEP
    number: int  # of the longest request


def cut(axis: Ragged, groups: int) -> Parts:
    """Enough parts to fill the device, whatever the number of requests and KV heads."""
    wanted = cdiv(PROGRAMS, groups * axis.num_requests)
    entries = cdiv(cdiv(axis.longest, wanted), STEP) * STEP
    return Parts(entries, cdiv(axis.longest, entries))


class Scored(NamedTuple):
    """What the entries of all spans are worth in one layer; :mod:`.parts` has what reads it."""

    attention: torch.Tensor  # [G, sum S] float32, the probe's; what is not finite counts as 0
    importance: torch.Tensor  # [G, sum S] float32, or its logs if sums are there; may be the attention itself
    sums: torch.Tensor | None = None  # [2, G, J, parts] float32: of each part's logs the largest, and the softmax's sum
    parts: Parts = Parts(STEP, 1)  # of the sums
    may_be_negative: bool = False  # the importance, if it is no log

    @property
    def is_log(self) -> bool:
        return self.sums is not None


def importance_of(scored: Scored, span: Ragged) -> torch.Tensor:
    """``[G, sum S]`` float32 finite importance, in torch: what :func:`read_importance` reads."""
    if not scored.is_log:
        return scored.importance.nan_to_num(0.0, 0.0, 0.0)
    logs = [scored.importance[:, own].softmax(-1) for own in span.ranges()]
    return torch.cat(logs, dim=1).nan_to_num(0.0, 0.0, 0.0)


@triton.jit
def sum_of_parts(sums, parts):
    """The sum of ``parts`` numbers."""
    total = tl.zeros([SUMMED], tl.float32)
    for first in range(0, parts, SUMMED):
        part = first + tl.arange(0, SUMMED)
        total += tl.load(sums + part, mask=part < parts, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def softmax_of_parts(tops, totals, parts):
    """The largest log of all parts, and the sum of exponentials below it."""
    top = tl.full([SUMMED], float("-inf"), tl.float32)
    for first in range(0, parts, SUMMED):
        part = first + tl.arange(0, SUMMED)
        top = tl.maximum(top, tl.load(tops + part, mask=part < parts, other=float("-inf")))
    largest = tl.max(top, 0)
    total = tl.zeros([SUMMED], tl.float32)
    for first in range(0, parts, SUMMED):
        part = first + tl.arange(0, SUMMED)
        decay = tl.exp(tl.load(tops + part, mask=part < parts, other=float("-inf")) - largest)
        total += tl.load(totals + part, mask=part < parts, other=0.0) * decay
    return largest, tl.sum(total, 0)


@triton.jit
def read_importance(importance, at, mask, largest, total, IS_LOG: tl.constexpr):
    """Finite importance at some places: by softmax if logs are there; what is not finite counts as 0."""
    value = tl.load(importance + at, mask=mask, other=0.0)
    if IS_LOG:
        value = tl.exp(value - largest) / total
    return tl.where(mask & (tl.abs(value) < float("inf")), value, 0.0)
