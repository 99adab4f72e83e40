"""Kept entries carry the attention of dropped ones as a bias in their keys, and move towards their repeats; fp32 torch.

The biases are those of Attention Matching (arXiv 2602.16284, section 3) in spirit: they make up for the mass that is
lost. They are not fitted, and lie in the keys themselves, where any attention kernel finds them.
"""

from typing import NamedTuple

import torch

from metasoft_kernels.merge.naive import gather

UNMATCHED_SHARE = 0.5  # of the attention to what nothing kept resembles: all kept entries carry it
KEY_SHARE = (
    0.5  # of the way to the mean key of an entry and the dropped repeats that it stands for; values go all of it
)
SPREAD_SHARE = 0.5  # of the variance of the repeats' log attention
LARGEST_BIAS = 4.0
TINY = 1e-12


class Carried(NamedTuple):
    """What kept entries become."""

    key_moves: torch.Tensor  # [B, G, d] float32, to be added to the kept keys
    values: torch.Tensor  # [B, G, d] float32


class Shares(NamedTuple):
    """How far kept entries stand for others."""

    count: torch.Tensor  # [G, B] log of what an entry is to count for, in units of its own attention
    bias: torch.Tensor  # [G, B] the same once its key has moved, and for queries that are not the probe's
    dropped: torch.Tensor  # [G, B] share of the attention to an entry's kind that went to dropped repeats
    weight: torch.Tensor  # [G, S] share of a dropped entry in those of its kind; 0 for what stays


def key_bias(
    keys: torch.Tensor,
    values: torch.Tensor,
    importance: torch.Tensor,
    kept: torch.Tensor,
    repeats: torch.Tensor,
    key_directions: torch.Tensor,
    scale: float,
    sink_tokens: int,
) -> Carried:
    """Let kept entries carry what is dropped.

    Args:
        keys, values: ``[S, G, d]``.
        importance: ``[G, S]`` float32 attention mass, at least 0.
        kept: ``[G, B]`` int64, ascending.
        repeats: ``[n, S]`` int64 from 0 to S - 1; a dropped entry's mass goes to the kept ones of equal number in the
            first row that has any. Entries of equal number in the first of all rows are repeats of each other.
        key_directions: ``[G, d]`` with ``q·u`` near 1 for every query to come.
        scale: factor on q·k.
        sink_tokens: first of the kept entries, which carry nothing.
    """
    found = shares(importance, kept, repeats, sink_tokens)
    moves, values = towards_repeats(keys, values, kept, repeats, found)
    return Carried(moves + found.bias.t().unsqueeze(-1) * (key_directions / scale), values)


def towards_repeats(
    keys: torch.Tensor, values: torch.Tensor, kept: torch.Tensor, repeats: torch.Tensor, found: Shares
) -> Carried:
    """Moves of the kept keys without their bias, and the values; arguments as for :func:`key_bias`."""
    dropped = found.dropped.t().unsqueeze(-1)
    towards = []
    for entries in (keys, values):
        weighted = entries.float() * found.weight.t().unsqueeze(-1)
        mean = torch.zeros_like(weighted).index_add_(0, repeats[0], weighted)  # of the dropped ones of each number
        towards.append(dropped * (gather(mean, repeats[0][kept]) - gather(entries, kept).float()))
    return Carried(KEY_SHARE * towards[0], gather(values, kept).float() + towards[1])


def shares(importance: torch.Tensor, kept: torch.Tensor, repeats: torch.Tensor, sink_tokens: int) -> Shares:
    """Biases, and who stands for whom.

    At the probe's query, the log of a kind's attention is the mean of its entries' logs, by their shares, plus the entropy
    of these shares; its gradient is the mean key. So a key that has moved all the way, with the entropy as its bias, is
    right to the first order in the query, and half the variance of the logits is what comes next. The variance under the
    probe stands in for that under queries to come, and the key goes half the way: the mean alone tells less than a member.
    """
    mass = importance.clone()
    mass[:, :sink_tokens] = 0
    is_kept = torch.zeros_like(mass).scatter_(1, kept, 1.0)
    own = mass * is_kept
    left, carried = mass - own, own
    for number, row in enumerate(repeats):
        holds, lacks = _sum_of_kind(own, row), _sum_of_kind(left, row)
        has_kept = holds > TINY
        carried = carried + torch.where(has_kept, own * lacks / holds.clamp_min(TINY), 0.0)
        if number == 0:
            dropped = torch.where(has_kept, lacks / (holds + lacks).clamp_min(TINY), 0.0)
            weight = torch.where(has_kept, left / lacks.clamp_min(TINY), 0.0)
            of_kind = torch.where(has_kept, mass / (holds + lacks).clamp_min(TINY), 0.0)
        left = left.masked_fill(has_kept, 0.0)
    share = left.sum(1, keepdim=True) / carried.sum(1, keepdim=True).clamp_min(TINY)
    carried = carried * (1 + UNMATCHED_SHARE * share)
    logs = mass.clamp_min(TINY).log()
    count = carried.clamp_min(TINY).log() - logs
    spread = _sum_of_kind(of_kind * (logs - _sum_of_kind(of_kind * logs, repeats[0])).square(), repeats[0])
    moved = KEY_SHARE * dropped * (_sum_of_kind(weight * logs, repeats[0]) - logs)
    bias = count - moved + SPREAD_SHARE * dropped * spread
    parts = (count.clamp(0, LARGEST_BIAS), bias.clamp(-LARGEST_BIAS, LARGEST_BIAS), dropped)
    return Shares(*(part.masked_fill(own <= TINY, 0.0).gather(1, kept) for part in parts), weight)


def _sum_of_kind(x: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    same = numbers.expand_as(x)
    return torch.zeros_like(x).scatter_add_(1, same, x).gather(1, same)
