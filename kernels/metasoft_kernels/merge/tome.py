"""Merging as in token merging (ToMe, arXiv 2210.09461) and D2O (arXiv 2406.13035), values only, in fp32 torch.

Weights as the ``MergingPress`` of kvpress 0.5.5 has them, at its defaults.
"""

import torch
from torch.nn.functional import normalize

from metasoft_kernels.merge.nearest import add_to, nearest, pick

NORM_EPSILON = 1e-6


def tome(keys: torch.Tensor, values: torch.Tensor, kept: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor:
    """Fold each dropped value into the kept entry whose key is most alike in direction.

    With similarity c, the cosine of the two keys, a dropped value weighs ``max(c, 0) |v_i| / (|v_i| + |v_j|)`` against
    the 1 of the kept one: ``v_j = (v_j + sum_i w_i v_i) / (1 + sum_i w_i)``.

    Args:
        keys, values: ``[S, G, d]`` of the span.
        kept, dropped: ``[G, B]``, ``[G, N]`` int64.

    Returns:
        ``[B, G, d]`` float32.
    """
    kept_values, dropped_values = pick(values, kept), pick(values, dropped)
    kept_keys = normalize(pick(keys, kept), dim=-1, eps=NORM_EPSILON)
    cosine, target = nearest(normalize(pick(keys, dropped), dim=-1, eps=NORM_EPSILON), kept_keys)
    size = dropped_values.norm(dim=-1)
    target_size = kept_values.norm(dim=-1).gather(1, target)
    weight = (cosine.clamp_min(0) * size / (size + target_size + NORM_EPSILON)).unsqueeze(-1)
    flow = add_to(target, weight * dropped_values, kept.shape[1])
    load = add_to(target, weight, kept.shape[1])
    return ((kept_values + flow) / (1 + load)).permute(1, 0, 2)
