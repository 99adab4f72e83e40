"""What an entry itself says about its worth: a small perceptron per layer and KV head refines the probe's attention.

Beyond the paper. The features do not change when the entry moves (RoPE turns pairs of a key's dimensions and keeps
their length), so what is learned on short prompts holds on long ones. KVzap and Fast KVzip show that such scorers come
close to the attention of a reconstruction; here the probe's attention is one feature of several.
"""

import torch
from metasoft_kernels.refine.naive import Weights, log_importance
from torch import nn

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
            mean, deviation: ``[layers, G, F]`` of :func:`metasoft_kernels.refine.naive.features` over some prompts;
                folded into the first layer.
        """
        features = self.hidden.shape[-2]
        weight = torch.randn(self.hidden.shape, generator=generator).to(mean) / features**0.5
        self.hidden.copy_(weight / deviation.clamp_min(1e-3).unsqueeze(-1))
        self.hidden_bias.copy_(-(mean.unsqueeze(-2) @ self.hidden).squeeze(-2))
        self.out.zero_()
        self.trust.fill_(1)
        self.neighbours.zero_()

    @property
    def weights(self) -> Weights:
        """All parameters, for the stages."""
        return Weights(self.hidden, self.hidden_bias, self.out, self.trust, self.neighbours)

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
        return log_importance(mass, keys, values, self.weights, (mode, *where))
