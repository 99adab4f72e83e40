"""The frozen model as training asks it: a few rows over entries that were computed once.

Because the model is causal, a prompt's keys and values do not depend on what follows: they are computed once, without
gradients, and everything else (answers, probes) runs a few rows over them.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from sglang_metasoft.hf.cache import Batch, generate
from sglang_metasoft.hf.model import HFModel, LayerKV, causal_attention

# (number among layers that see all tokens, q [H, t, d], k [G, C + t, d], v [G, C + t, d], scale) -> output [H, t, d]
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]


class Layers(list):
    """KV of one prompt: ``(keys, values)`` a layer, ``[G, C, d]`` each."""

    @property
    def length(self) -> int:
        return self[0][0].shape[1]

    @property
    def entries(self) -> list[LayerKV]:
        """The same entries in the pool's layout."""
        return [LayerKV(keys.transpose(0, 1), values.transpose(0, 1)) for keys, values in self]

    @classmethod
    def of(cls, entries: list[LayerKV]) -> "Layers":
        return cls((kv.key.transpose(0, 1), kv.value.transpose(0, 1)) for kv in entries)


class Backbone(HFModel):
    """A causal language model whose weights never change.

    Args:
        path: folder or hub id; its last part is the model's name in compressors.
        device, dtype: where and in what the model runs.

    Raises:
        ValueError: no causal language model there, or one whose attention is not plain causal attention.
    """

    def __init__(self, path: str, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(path, device, dtype)
        self.shape = self.shape._replace(name=Path(path).name)

    def table(self) -> torch.Tensor:
        """``[V, D]`` every token's embedding; some tables have a factor, which their weights do not show."""
        rows = self.model.get_input_embeddings().weight.shape[0]
        return self.embed(torch.arange(rows, device=self.device))

    def rows(
        self,
        inputs: torch.Tensor,
        context: Layers | None,
        attend: Attend | None = None,
        start: int | None = None,
        logits: bool = False,
    ) -> tuple[torch.Tensor, Layers]:
        """Run a few rows over a context.

        Args:
            inputs: ``[t]`` ids or ``[t, D]`` embeddings.
            context: what they see; None for nothing.
            attend: answers the attention call of each layer that sees all tokens; None for the usual attention. Layers
                of a window keep all that they see, whatever is dropped elsewhere: they have the usual one always.
            start: position of the first row; the context's length unless given.
            logits: return ``[t, vocab]`` logits instead of hidden states ``[t, D]``.

        Returns:
            Logits or hidden states, and the entries of context and rows.
        """
        seen, numbers = Layers(), {layer: number for number, layer in enumerate(self.full_layers)}

        def answer(layer, q, k, v, scale):
            if context is not None:
                k, v = (torch.cat([old.to(new)[None], new], 2) for old, new in zip(context[layer], (k, v), strict=True))
            seen.append((k[0], v[0]))
            if attend is None or self.windows[layer] is not None:
                return causal_attention(q, k, v, scale, self.windows[layer])
            return attend(numbers[layer], q[0], k[0], v[0], scale)[None]

        if start is None:
            start = context.length if context is not None else 0
        embeds = inputs if inputs.dim() == 2 else self.embed(inputs)
        positions = torch.arange(start, start + len(inputs), device=self.device)
        call = self.logits if logits else self.run
        return call(embeds[None], positions[None], answer)[0], seen

    @torch.no_grad()
    def answers(self, context: Layers, questions: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        """Greedy answers to several questions over one context, as one batch, without end tokens.

        Args:
            context: what all of them follow.
            questions: token ids.
        """
        rows, first = [], []
        for ids in questions:
            logits, seen = self.rows(self.tensor(ids), context, logits=True)
            rows.append(seen.entries)
            first.append(int(logits[-1].argmax()))
        starts = self.tensor([context.length + len(ids) for ids in questions])
        found = generate(Batch(self, rows, max_new_tokens), first, starts, max_new_tokens)
        return [answer[:-1] if answer[-1] in self.end_ids else answer for answer in found]
