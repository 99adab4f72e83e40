"""Requests side by side in one tensor: where each one's rows begin."""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch


class Ragged(NamedTuple):
    """One axis that J requests share, each with a length of its own.

    Known on the host from lengths alone and copied to the device once per batch, so that no launch has to wait.
    """

    starts: torch.Tensor  # [J + 1] int32, on the device; request j has the rows starts[j] up to starts[j + 1]
    lengths: tuple[int, ...]

    @property
    def num_requests(self) -> int:
        return len(self.lengths)

    @property
    def total(self) -> int:
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def ranges(self) -> list[slice]:
        """Each request's rows."""
        ends = list(accumulate(self.lengths))
        return [slice(end - length, end) for end, length in zip(ends, self.lengths, strict=True)]


def ragged(device: torch.device, *axes: Sequence[int]) -> list[Ragged]:
    """Axes of the given lengths; all of them reach the device in one copy that the host does not wait for.

    Args:
        axes: for each axis the lengths of its J requests.
    """
    number = len(axes[0]) + 1
    # Each row begins at a multiple of 16 bytes: Triton compiles a kernel anew for a pointer that does not.
    unused = [0] * (-number % 4)
    starts = torch.tensor([[0, *accumulate(lengths), *unused] for lengths in axes], dtype=torch.int32)
    if device.type == "cuda":
        starts = starts.pin_memory()
    starts = starts.to(device, non_blocking=True)
    return [Ragged(row[:number], tuple(lengths)) for row, lengths in zip(starts, axes, strict=True)]


def rows_of_each(rows: torch.Tensor, axis: Ragged, along: Ragged) -> list[torch.Tensor]:
    """Each request's part of ``[G, axis.total]`` int32 rows of another axis, int64, counted from its start there."""
    ranges = zip(axis.ranges(), along.ranges(), strict=True)
    return [rows[:, own].to(torch.int64) - there.start for own, there in ranges]


def single(device: torch.device, *lengths: int) -> list[Ragged]:
    """Axes of one request; made on the device, so that nothing is copied."""
    return [Ragged(torch.arange(2, dtype=torch.int32, device=device) * length, (length,)) for length in lengths]
