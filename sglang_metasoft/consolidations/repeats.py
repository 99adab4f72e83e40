"""What a prompt says more than once: entries of equal last tokens are nearly the same, and one can stand for many."""

import torch

ORDERS = (3, 1)  # equal in the last three tokens; failing those, in the token itself
ID_BITS = 21  # of one token id in the code of several
LARGEST_INT32 = 2**31 - 1


def find_repeats(ids: torch.Tensor) -> torch.Tensor:
    """Number the entries so that those of equal last tokens have equal numbers; does not wait for the device.

    Args:
        ids: ``[S]`` int64 token ids of the span, below 2 to the power of ID_BITS.

    Returns:
        ``[len(ORDERS), S]`` int64 numbers from 0 to S - 1, one row for each of ORDERS. What lies before the span counts
        as unlike everything.
    """
    return torch.stack([_number(_codes(ids, order)) for order in ORDERS])


def _codes(ids: torch.Tensor, order: int) -> torch.Tensor:
    codes = ids
    for back in range(1, order):
        before = torch.nn.functional.pad(ids, (back, 0))[: ids.numel()]
        codes = codes | (before << (back * ID_BITS))
    if order == 1:
        return codes
    place = torch.arange(ids.numel(), device=ids.device)
    return torch.where(place < order - 1, -1 - place, codes)


def _number(codes: torch.Tensor) -> torch.Tensor:
    ordered, place = codes.sort(stable=True)
    is_new = torch.nn.functional.pad(ordered[1:] != ordered[:-1], (1, 0))
    return torch.empty_like(codes).scatter_(0, place, is_new.cumsum(0))


def demote_repeats(importance: torch.Tensor, repeats: torch.Tensor) -> torch.Tensor:
    """Rank what is said once before what was said already: a kept entry can carry the attention of its repeats.

    Of entries with equal numbers the best one counts for the geometric mean of its own importance and the sum of all of
    them, the next one for a half of its own, the one after it for a third.

    Args:
        importance: ``[G, S]`` float32; where it goes below 0, counted from the smallest.
        repeats: ``[S]`` int64 from 0 to S - 1, as :func:`find_repeats` gives.

    Returns:
        ``[G, S]`` float32, at least 0.
    """
    importance = (importance - importance.amin(1, keepdim=True).clamp_max(0)).abs()
    rank = rank_among_repeats(importance, repeats)
    same = repeats.expand_as(rank)
    total = torch.zeros_like(importance).scatter_add_(1, same, importance).gather(1, same)
    return torch.where(rank == 0, (importance * total).sqrt(), importance / (1 + rank))


def rank_among_repeats(importance: torch.Tensor, repeats: torch.Tensor) -> torch.Tensor:
    """How many entries of equal number come before each one.

    Args:
        importance: ``[G, S]`` float32, at least 0.
        repeats: as for :func:`demote_repeats`.

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
