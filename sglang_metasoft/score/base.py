"""What a method has to say: which tokens probe the prompt, and how their attention becomes importance."""

import abc
from collections.abc import Callable

import torch
from metasoft_kernels.score import importance

from sglang_metasoft.config import MetaSoftConfig
from sglang_metasoft.types import ModelShape, Probe, Prompt, Scores

Embed = Callable[[torch.Tensor], torch.Tensor]


class Method(abc.ABC):
    """Base of all methods. Constructed once per scheduler process, from the same inputs on every rank."""

    default_consolidation = "attention_flow"

    def __init__(self, config: MetaSoftConfig, shape: ModelShape, embed: Embed, device: torch.device) -> None:
        """
        Args:
            config: the server's settings.
            shape: the served model.
            embed: ``[n]`` int64 ids on ``device`` to ``[n, D]`` embeddings; on every rank at the same time.
            device: where probes are made.

        Raises:
            ValueError: the method cannot serve this model, both named.
        """
        self.config = config
        self.shape = shape
        self.embed = embed
        self.device = device

    @property
    def identity(self) -> str:
        """What makes this compressor's results its own; prefixes with different identities are never shared."""
        return type(self).__name__

    @property
    def description(self) -> str:
        """For the start-up log."""
        return self.identity

    @abc.abstractmethod
    def probe(self, prompt: Prompt) -> Probe:
        """The probe tokens for a prompt. Must depend on its arguments alone and not wait for the device."""

    def score(
        self,
        q: torch.Tensor,
        k_buffer: torch.Tensor,
        span_slots: torch.Tensor,
        lse: torch.Tensor,
        scale: float,
        k_scale: float,
    ) -> Scores:
        """Importance of the span at one layer; shapes as :func:`metasoft_kernels.score.importance`."""
        return Scores(importance(q, k_buffer, span_slots, lse, scale, k_scale, self.config.kernels))

    def gate_scale(self, layer: int, first_kv_head: int, num_kv_heads: int) -> torch.Tensor | float:
        """Factor on the consolidation gate at ``layer`` for a rank's KV heads: a number or ``[G, 1]``."""
        return 1.0
