"""What an entry itself says about its worth, in fp32 torch: a small perceptron per layer and KV head.

A row of features is the value, the lengths of the key's pairs of dimensions, and the logs of the probe's attention to
the entry and to its neighbourhood, each less its mean over the span.
"""

from typing import NamedTuple

import torch

MASS_FLOOR = 1e-9
POOL_ENTRIES = 7


class Weights(NamedTuple):
    """Of all modes, layers and KV heads of the model; float32."""

    hidden: torch.Tensor  # [modes, layers, G, F, W], F = d + d // 2 + 2
    hidden_bias: torch.Tensor  # [modes, layers, G, W]
    out: torch.Tensor  # [modes, layers, G, W]
    trust: torch.Tensor  # [modes, layers, G], factor on the log of the attention
    neighbours: torch.Tensor  # [modes, layers, G], factor on that of the neighbourhood


def features(mass: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """``[..., G, S, F]`` float32 from attention ``[..., G, S]`` and entries ``[..., G, S, d]``."""
    log_mass = mass.clamp_min(MASS_FLOOR).log()
    pooled = torch.nn.functional.avg_pool1d(
        mass.flatten(0, -2).unsqueeze(1), POOL_ENTRIES, 1, POOL_ENTRIES // 2, count_include_pad=False
    )
    log_pooled = pooled.view_as(mass).clamp_min(MASS_FLOOR).log()
    logs = torch.stack([log_mass - log_mass.mean(-1, keepdim=True), log_pooled - log_pooled.mean(-1, keepdim=True)])
    half = keys.shape[-1] // 2
    pairs = torch.hypot(keys[..., :half].float(), keys[..., half : 2 * half].float())
    return torch.cat([values.float(), pairs, logs.movedim(0, -1)], dim=-1)


def log_importance(
    mass: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, weights: Weights, at: tuple
) -> torch.Tensor:
    """Log importance, up to a constant of each head.

    Args:
        mass: ``[..., G, S]`` float32 attention of the probe.
        keys, values: ``[..., G, S, d]``.
        at: which mode, layers and heads these are: an index into ``[modes, layers, G]``.

    Returns:
        ``[..., G, S]`` float32.
    """
    x = features(mass, keys, values)
    hidden = torch.nn.functional.silu(x @ weights.hidden[at] + weights.hidden_bias[at].unsqueeze(-2))
    linear = weights.trust[at].unsqueeze(-1) * x[..., -2] + weights.neighbours[at].unsqueeze(-1) * x[..., -1]
    return linear + (hidden @ weights.out[at].unsqueeze(-1)).squeeze(-1)
