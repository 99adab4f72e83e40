"""Kept entries carry the attention of dropped ones as a bias in their keys; values stay. In fp32 torch.

The biases are those of Attention Matching (arXiv 2602.16284, section 3) in spirit: they make up for the mass that is
lost. They are not fitted, and lie in the keys themselves, where any attention kernel finds them.
"""

import torch

UNMATCHED_SHARE = 0.5  # of the attention to what nothing kept resembles: all kept entries carry it
LARGEST_BIAS = 4.0
TINY = 1e-12


def key_bias(
    importance: torch.Tensor,
    kept: torch.Tensor,
    repeats: torch.Tensor,
    key_directions: torch.Tensor,
    scale: float,
    sink_tokens: int,
) -> torch.Tensor:
    """What is to be added to the kept keys.

    Args:
        importance: ``[G, S]`` float32 attention mass, at least 0.
        kept: ``[G, B]`` int64, ascending.
        repeats: ``[n, S]`` int64 from 0 to S - 1; a dropped entry's mass goes to the kept ones of equal number in the
            first row that has any.
        key_directions: ``[G, d]`` with ``q·u`` near 1 for every query to come.
        scale: factor on q·k.
        sink_tokens: first of the kept entries, which carry nothing.

    Returns:
        ``[B, G, d]`` float32.
    """
    bias = log_biases(importance, kept, repeats, sink_tokens)
    return bias.t().unsqueeze(-1) * (key_directions / scale)


def log_biases(importance: torch.Tensor, kept: torch.Tensor, repeats: torch.Tensor, sink_tokens: int) -> torch.Tensor:
    """``[G, B]`` float32: log of what a kept entry is to count for, in units of its own attention."""
    mass = importance.clone()
    mass[:, :sink_tokens] = 0
    is_kept = torch.zeros_like(mass).scatter_(1, kept, 1.0)
    own = mass * is_kept
    left, carried = mass - own, own
    for row in repeats:
        same = row.expand_as(mass)
        holds, lacks = (torch.zeros_like(mass).scatter_add_(1, same, part).gather(1, same) for part in (own, left))
        has_kept = holds > TINY
        carried = carried + torch.where(has_kept, own * lacks / holds.clamp_min(TINY), 0.0)
        left = left.masked_fill(has_kept, 0.0)
    share = left.sum(1, keepdim=True) / carried.sum(1, keepdim=True).clamp_min(TINY)
    carried = carried * (1 + UNMATCHED_SHARE * share)
    bias = (carried / own.clamp_min(TINY)).clamp_min(1).log().clamp_max(LARGEST_BIAS)
    return bias.masked_fill(own <= TINY, 0.0).gather(1, kept)
