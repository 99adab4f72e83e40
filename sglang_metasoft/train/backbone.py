"""The frozen Hugging Face model, with an attention call that can be watched and taken part in.

Because the model is causal, a prompt's keys and values do not depend on what follows: they are computed once, without
gradients, and everything else (answers, probes) runs a few rows over them.
"""

import contextlib
import contextvars
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.masking_utils import AttentionMaskInterface

from sglang_metasoft.types import ModelShape

ATTENTION = "metasoft_train"
# (layer, q [H, t, d], k [G, C + t, d], v [G, C + t, d], scale) -> output [H, t, d]
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
_attend: contextvars.ContextVar[Attend | None] = contextvars.ContextVar("attend", default=None)


def _attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    attend = _attend.get()
    if attend is not None:
        out = attend(module.layer_idx, query[0], key[0], value[0], scaling)[None]
    else:
        rows, keys = query.shape[2], key.shape[2]
        mask = None
        if 1 < rows != keys:
            mask = torch.ones(rows, keys, dtype=torch.bool, device=query.device).tril(keys - rows)
        out = scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=rows == keys, scale=scaling, enable_gqa=True
        )
    return out.transpose(1, 2), None


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)  # always causal, one prompt at a time


class Layers(list):
    """KV of one prompt: ``(keys, values)`` a layer, ``[G, C, d]`` each."""

    @property
    def length(self) -> int:
        return self[0][0].shape[1]

    def cache(self, dtype: torch.dtype, device: torch.device) -> DynamicCache:
        """A fresh cache with these entries."""
        cache = DynamicCache()
        for number, (keys, values) in enumerate(self):
            cache.update(keys[None].to(device, dtype), values[None].to(device, dtype), number)
        return cache

    @classmethod
    def of(cls, cache: DynamicCache) -> "Layers":
        return cls((layer.keys[0], layer.values[0]) for layer in cache.layers)


class Backbone:
    """A causal language model whose weights never change.

    Args:
        path: folder or hub id.
        device, dtype: where and in what the model runs.

    Raises:
        ValueError: no causal language model there, or one whose attention is not plain causal attention.
    """

    def __init__(self, path: str, device: torch.device, dtype: torch.dtype) -> None:
        try:
            config = AutoConfig.from_pretrained(path)
            self.model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=ATTENTION)
            self.tokenizer = AutoTokenizer.from_pretrained(path)
        except Exception as error:
            raise ValueError(f"model: {path!r} is not a causal language model that can be loaded: {error}") from None
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"} or not hasattr(config, "num_key_value_heads"):
            raise ValueError(
                f"model: {path!r} has layers of kind {sorted(kinds)}; allowed: full causal attention alone"
            )
        self.model.requires_grad_(False).eval().to(device)
        self.device, self.dtype = device, dtype
        heads = config.num_attention_heads
        self.shape = ModelShape(
            name=Path(path).name,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_layers=config.num_hidden_layers,
            num_heads=heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        )
        self.body = self.model.base_model

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """``[n]`` ids to ``[n, D]`` embeddings."""
        return self.model.get_input_embeddings()(ids)

    def tensor(self, ids: list[int]) -> torch.Tensor:
        return torch.tensor(ids, dtype=torch.int64, device=self.device)

    def rows(
        self,
        inputs: torch.Tensor,
        context: Layers | None,
        attend: Attend | None = None,
        start: int | None = None,
        logits: bool = False,
    ) -> tuple[torch.Tensor, DynamicCache]:
        """Run a few rows over a context.

        Args:
            inputs: ``[t]`` ids or ``[t, D]`` embeddings.
            context: what they see; None for nothing.
            attend: answers each layer's attention call; None for the usual attention.
            start: position of the first row; the context's length unless given.
            logits: return ``[t, vocab]`` logits instead of hidden states ``[t, D]``.

        Returns:
            Logits or hidden states, and the cache with context and rows.
        """
        cache = context.cache(self.dtype, self.device) if context is not None else DynamicCache()
        start = start if start is not None else cache.get_seq_length()
        positions = torch.arange(start, start + inputs.shape[0], device=self.device)[None]
        named = {"inputs_embeds": inputs[None].to(self.dtype)} if inputs.dim() == 2 else {"input_ids": inputs[None]}
        with _attending(attend):
            call = self.model if logits else self.body
            out = call(**named, past_key_values=cache, position_ids=positions, use_cache=True)
        return (out.logits if logits else out.last_hidden_state)[0], cache

    @torch.no_grad()
    def prefill(self, ids: list[int]) -> Layers:
        """KV of a prompt."""
        return Layers.of(self.rows(self.tensor(ids), None)[1])

    @torch.no_grad()
    def generate(self, context: Layers, ids: list[int], max_new_tokens: int) -> list[int]:
        """Greedy answer after ``ids`` over ``context``, without the end token."""
        end = self.model.generation_config.eos_token_id
        ends = set(end if isinstance(end, list) else [end])
        logits, cache = self.rows(self.tensor(ids), context, logits=True)
        answer: list[int] = []
        while len(answer) < max_new_tokens:
            token = int(logits[-1].argmax())
            if token in ends:
                break
            answer.append(token)
            logits = self.model(self.tensor([token])[None], past_key_values=cache, use_cache=True).logits[0]
        return answer


@contextlib.contextmanager
def _attending(attend: Attend | None):
    token = _attend.set(attend)
    try:
        yield
    finally:
        _attend.reset(token)
