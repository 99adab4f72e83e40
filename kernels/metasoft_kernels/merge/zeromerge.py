"""ZeroMerge (arXiv 2503.10714): a few residual entries hold the means of what was dropped. Values only, in fp32 torch.

The paper merges keys too and adds ``alpha * log(count)`` to a residual entry's logit. A server's attention kernels have
no such term, and a merged key would stand at no position; so keys stay, and with them the mass of one entry. Similarity
is the dot product of keys, as in the authors' code.
"""

import torch

from metasoft_kernels.merge.nearest import add_to, nearest, pick

RESIDUAL_SHARE = 10


def zeromerge(
    keys: torch.Tensor, values: torch.Tensor, importance: torch.Tensor, kept: torch.Tensor, dropped: torch.Tensor
) -> torch.Tensor:
    """Fold each dropped value into the residual entry with the largest k·k; equal counts weigh equally.

    The residual entries are the tenth of the kept ones with the least mass, one at least; all others stay as they are.

    Args:
        keys, values: ``[S, G, d]`` of the span.
        importance: ``[G, S]`` float32 attention mass.
        kept, dropped: ``[G, B]``, ``[G, N]`` int64.

    Returns:
        ``[B, G, d]`` float32.
    """
    slots = kept.shape[1]
    residual = importance.gather(1, kept).sort(dim=1, stable=True).indices[:, : max(1, slots // RESIDUAL_SHARE)]
    _, nearest_residual = nearest(pick(keys, dropped), pick(keys, kept.gather(1, residual)))
    target = residual.gather(1, nearest_residual)
    kept_values, dropped_values = pick(values, kept), pick(values, dropped)
    count = add_to(target, torch.ones_like(dropped_values[..., :1]), slots)
    return ((kept_values + add_to(target, dropped_values, slots)) / (1 + count)).permute(1, 0, 2)
