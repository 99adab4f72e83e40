"""What an entry itself says about its worth: a small perceptron per layer and KV head refines the probe's attention.

Beyond the paper. The features do not change when the entry moves (RoPE turns pairs of a key's dimensions and keeps
their length), so what is learned on short prompts holds on long ones. KVzap and Fast KVzip show that such scorers come
close to the attention of a reconstruction; here the probe's attention is one feature of several.
"""

import torch
from torch import nn

MASS_FLOOR = 1e-9
POOL_ENTRIES = 7
MODES = 2  # 0: the probe saw the question, 1: the span ends at a boundary and any question may follow
EXTRA_FEATURES = 2  # the probe's attention, and that to the neighbourhood


class EntryScorer(nn.Module):
    """Log importance from the probe's attention, the value, and the key's pair lengths.

    Args:
        num_layers, num_kv_heads: of the whole model.
        head_dim: d.
        width: of the hidden layer.
    """

    def __init__(self, num_layers: int, num_kv_heads: int, head_dim: int, width: int) -> None:
        super().__init__()
        heads = (MODES, num_layers, num_kv_heads)
        features = head_dim + head_dim // 2 + EXTRA_FEATURES
        self.hidden = nn.Parameter(torch.empty(*heads, features, width))
        self.hidden_bias = nn.Parameter(torch.empty(*heads, width))
        self.out = nn.Parameter(torch.empty(*heads, width))
        self.trust = nn.Parameter(torch.empty(*heads))  # factor on the probe's log attention
        self.neighbours = nn.Parameter(torch.empty(*heads))  # factor on that of the neighbourhood

    @torch.no_grad()
    def initialize(self, mean: torch.Tensor, deviation: torch.Tensor, generator: torch.Generator) -> None:
        """Start as the identity on the probe's attention.

        Args:
            mean, deviation: ``[layers, G, F]`` of :meth:`features` over some prompts; folded into the first layer.
        """
        features = self.hidden.shape[-2]
        weight = torch.randn(self.hidden.shape, generator=generator).to(mean) / features**0.5
        self.hidden.copy_(weight / deviation.clamp_min(1e-3).unsqueeze(-1))
        self.hidden_bias.copy_(-(mean.unsqueeze(-2) @ self.hidden).squeeze(-2))
        self.out.zero_()
        self.trust.fill_(1)
        self.neighbours.zero_()

    @staticmethod
    def features(mass: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """``[..., G, S, F]`` float32 from attention ``[..., G, S]`` and entries ``[..., G, S, d]``."""
        log_mass = mass.clamp_min(MASS_FLOOR).log()
        pooled = nn.functional.avg_pool1d(
            mass.flatten(0, -2).unsqueeze(1), POOL_ENTRIES, 1, POOL_ENTRIES // 2, count_include_pad=False
        )
        log_pooled = pooled.view_as(mass).clamp_min(MASS_FLOOR).log()
        logs = torch.stack([log_mass - log_mass.mean(-1, keepdim=True), log_pooled - log_pooled.mean(-1, keepdim=True)])
        half = keys.shape[-1] // 2
        pairs = torch.hypot(keys[..., :half].float(), keys[..., half:].float())
        return torch.cat([values.float(), pairs, logs.movedim(0, -1)], dim=-1)

    def forward(
        self, mass: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mode: int, where: tuple = (slice(None),)
    ) -> torch.Tensor:
        """Log importance, up to a constant of each head.

        Args:
            mass: ``[..., G, S]`` attention of the probe.
            keys, values: ``[..., G, S, d]``.
            mode: 1 at a boundary, else 0.
            where: which layers and heads these are: an index into ``[layers, G]``.

        Returns:
            ``[..., G, S]`` float32.
        """
        x = self.features(mass, keys, values)
        at = (mode, *where)
        hidden = nn.functional.silu(x @ self.hidden[at] + self.hidden_bias[at].unsqueeze(-2))
        linear = self.trust[at].unsqueeze(-1) * x[..., -2] + self.neighbours[at].unsqueeze(-1) * x[..., -1]
        return linear + (hidden @ self.out[at].unsqueeze(-1)).squeeze(-1)
