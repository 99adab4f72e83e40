"""A random choice of kept entries, for tests of the stages after it."""

import torch
from metasoft_kernels.ragged import ragged
from metasoft_kernels.select import naive as select

from tests.kernels.cases import DEVICE


def partition(groups: int, lengths: list[int], share: int = 4):
    """Kept and dropped entries of each request, ``[G, sum B]`` and ``[G, sum N]`` int32, and the three axes."""
    kept = [max(1, length // share) for length in lengths]
    counts = [lengths, kept, [a - b for a, b in zip(lengths, kept, strict=True)]]
    span, kept, dropped = ragged(torch.device(DEVICE), *counts)
    parts = []
    for entries, count in zip(span.ranges(), kept.lengths, strict=True):
        mass = torch.rand(groups, entries.stop - entries.start)
        parts.append([rows + entries.start for rows in select.split_top(mass, count, 0)])
    rows = [torch.cat(both, 1).to(torch.int32).to(DEVICE) for both in zip(*parts, strict=True)]
    return *rows, span, kept, dropped
