"""Groups of entries that say the same, and their ranking, in fp32 torch."""

from typing import NamedTuple

import torch

LARGEST_INT32 = 2**31 - 1


class Groups(NamedTuple):
    """A request's entries put in order so that each group's are side by side; one row for each way of grouping.

    Entries and places count from the start of the request, in a ragged batch too.
    """

    order: torch.Tensor  # [n, S] int32: the entry at each place, ascending within a group
    first: torch.Tensor  # [n, S] int32: where the place's group begins
    end: torch.Tensor  # [n, S] int32: and where it ends

    @property
    def numbers(self) -> torch.Tensor:
        """``[n, S]`` int64: the same number, from 0 to S - 1, for each entry of a group, and another for each group."""
        return torch.empty_like(self.first).scatter_(1, self.order.long(), self.first).long()


def group(codes: torch.Tensor) -> Groups:
    """Entries of equal codes are a group; does not wait for the device.

    Args:
        codes: ``[n, S]`` int64.
    """
    ordered, order = codes.sort(dim=1, stable=True)
    place = torch.arange(codes.shape[1], dtype=torch.int32, device=codes.device).expand_as(order)
    differs = ordered[:, 1:] != ordered[:, :-1]
    begins = torch.nn.functional.pad(differs, (1, 0), value=True)
    ends = torch.nn.functional.pad(differs, (0, 1), value=True)
    first = torch.where(begins, place, 0).cummax(1).values
    end = torch.where(ends, place + 1, codes.shape[1]).flip(1).cummin(1).values.flip(1)
    return Groups(order.to(torch.int32), first.to(torch.int32), end.to(torch.int32))


def demote(importance: torch.Tensor, repeats: torch.Tensor) -> torch.Tensor:
    """Rank what is said once before what was said already.

    Of entries with equal numbers the best one counts for the geometric mean of its own importance and the sum of all of
    them, the next one for a half of its own, the one after it for a third.

    Args:
        importance: ``[G, S]`` float32, at least 0.
        repeats: ``[S]`` int64 from 0 to S - 1, as :attr:`Groups.numbers` has them.

    Returns:
        ``[G, S]`` float32, at least 0.
    """
    rank = rank_among_repeats(importance, repeats)
    same = repeats.expand_as(rank)
    total = torch.zeros_like(importance).scatter_add_(1, same, importance).gather(1, same)
    return torch.where(rank == 0, (importance * total).sqrt(), importance / (1 + rank))


def rank_among_repeats(importance: torch.Tensor, repeats: torch.Tensor) -> torch.Tensor:
    """How many entries of equal number come before each one: those of more importance, or of as much and earlier.

    Args:
        importance, repeats: as for :func:`demote`.

    Returns:
        ``[G, S]`` int64.
    """
    # Floats from +0 on are in the order of their bits: one sort puts each number's entries together, the best first.
    codes = (repeats << 32) | (LARGEST_INT32 - importance.view(torch.int32).to(torch.int64))
    codes, entry = codes.sort(dim=1, stable=True)
    numbers = codes >> 32
    count = torch.arange(repeats.numel(), device=repeats.device).expand_as(entry)
    is_first = torch.nn.functional.pad(numbers[:, 1:] != numbers[:, :-1], (1, 0), value=True)
    rank = count - torch.where(is_first, count, 0).cummax(1).values
    return torch.empty_like(rank).scatter_(1, entry, rank)
