"""What a prompt says more than once: entries of equal last tokens are nearly the same, and one can stand for many."""

from functools import cached_property

import torch
from metasoft_kernels.repeats.naive import Groups, demote, group

ORDERS = (3, 1)  # equal in the last three tokens; failing those, in the token itself
ID_BITS = 21  # of one token id in the code of several


def group_repeats(ids: torch.Tensor) -> Groups:
    """Put the entries of equal last tokens together; does not wait for the device.

    Args:
        ids: ``[S]`` int64 token ids of the span, below 2 to the power of ID_BITS.

    Returns:
        ``[len(ORDERS), S]``, one row for each of ORDERS. What lies before the span counts as unlike everything.
    """
    return group(torch.stack([_codes(ids, order) for order in ORDERS]))


def find_repeats(ids: torch.Tensor) -> torch.Tensor:
    """Number the entries so that those of equal last tokens have equal numbers.

    Args:
        ids: as for :func:`group_repeats`.

    Returns:
        ``[len(ORDERS), S]`` int64 numbers from 0 to S - 1, one row for each of ORDERS.
    """
    return group_repeats(ids).numbers


def _codes(ids: torch.Tensor, order: int) -> torch.Tensor:
    codes = ids
    for back in range(1, order):
        before = torch.nn.functional.pad(ids, (back, 0))[: ids.numel()]
        codes = codes | (before << (back * ID_BITS))
    if order == 1:
        return codes
    place = torch.arange(ids.numel(), device=ids.device)
    return torch.where(place < order - 1, -1 - place, codes)


class Repeats:
    """What a span says more than once: found once for all layers, when it is first asked for.

    Args:
        ids: ``[S]`` int64, as for :func:`group_repeats`.
    """

    def __init__(self, ids: torch.Tensor) -> None:
        self.ids = ids

    @cached_property
    def groups(self) -> Groups:
        """For the kernels."""
        return group_repeats(self.ids)

    @cached_property
    def numbers(self) -> torch.Tensor:
        """``[len(ORDERS), S]`` int64, as of :func:`find_repeats`."""
        return self.groups.numbers

    @cached_property
    def repeated(self) -> torch.Tensor | None:
        """Entries that the first of ORDERS finds more than once, ascending; None: asking would wait for a device."""
        if self.ids.device.type != "cpu":
            return None
        order, first, end = (part[0] for part in self.groups)
        return order[end - first > 1].sort().values.long()

    def demote(self, importance: torch.Tensor) -> torch.Tensor:
        """:func:`demote_repeats` by the first of ORDERS; what is said once is not sorted."""
        if self.repeated is None:
            return demote_repeats(importance, self.numbers[0])
        importance = from_the_smallest(importance)
        ranked = importance.square().sqrt()  # as for a group of one
        ranked[:, self.repeated] = demote(importance[:, self.repeated], self._numbers_of_repeated)
        return ranked

    @cached_property
    def _numbers_of_repeated(self) -> torch.Tensor:
        return group(self.numbers[:1, self.repeated]).numbers[0]


def demote_repeats(importance: torch.Tensor, repeats: torch.Tensor) -> torch.Tensor:
    """:func:`metasoft_kernels.repeats.naive.demote` of any finite importance.

    Args:
        importance: ``[G, S]`` float32; where it goes below 0, counted from the smallest.
        repeats: ``[S]`` int64 from 0 to S - 1, as :func:`find_repeats` gives.

    Returns:
        ``[G, S]`` float32, at least 0.
    """
    return demote(from_the_smallest(importance), repeats)


def from_the_smallest(importance: torch.Tensor) -> torch.Tensor:
    """``[G, S]`` float32 importance, counted from each head's smallest where that is below 0."""
    return (importance - importance.amin(1, keepdim=True).clamp_max(0)).abs()
