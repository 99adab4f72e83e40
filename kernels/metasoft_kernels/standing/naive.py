"""How high an entry stands among its head's by the probe's attention and by how unlike all others its key is, in torch.

A standing is the place among all entries, from 0 to 1, that a value would have if they were normally distributed: it
needs a mean and a deviation where a place needs a sort. Compared are the log of the attention, averaged over a
neighborhood, and the cosine of a key with the mean direction of all keys (KeyDiff, arXiv 2504.15364).
"""

import torch
from torch.nn.functional import avg_pool1d, normalize

MASS_FLOOR = 1e-9
POOL_ENTRIES = 7
UNLIKE_FOR_ONE = 3  # entries that stay for their unlike keys, for one that stays for the attention
SMALLEST_DEVIATION = 1e-6  # less is rounding


def better_standing(mass: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """The better of an entry's two standings; that by attention ends ``UNLIKE_FOR_ONE`` times as soon.

    Args:
        mass: ``[G, S]`` float32 attention of the probe.
        keys: ``[G, S, d]``, of any dtype and scale.

    Returns:
        ``[G, S]`` float32 from 0 to 1.
    """
    pooled = avg_pool1d(mass.unsqueeze(1), POOL_ENTRIES, 1, POOL_ENTRIES // 2, count_include_pad=False).squeeze(1)
    attended, unlike = above(pooled.clamp_min(MASS_FLOOR).log()), above(-cosine_to_anchor(keys))
    return 1 - torch.minimum(UNLIKE_FOR_ONE * attended, unlike)


def above(values: torch.Tensor) -> torch.Tensor:
    """The share of a normal distribution with the mean and the deviation of a row that lies above each value."""
    deviation, mean = torch.std_mean(values, dim=-1, correction=0, keepdim=True)
    return torch.special.ndtr((mean - values) / deviation.clamp_min(SMALLEST_DEVIATION))


def cosine_to_anchor(keys: torch.Tensor) -> torch.Tensor:
    """Cosine of each key with the mean of its head's keys scaled to length one; ``[G, S, d]`` to ``[G, S]`` float32."""
    directions = normalize(keys.float(), dim=-1)
    return (directions * normalize(directions.mean(-2, keepdim=True), dim=-1)).sum(-1)
