"""A frozen Hugging Face causal LM whose attention calls are answered by this project.

The model keeps no cache: what new tokens see, and where their keys and values go, is for the function that answers the
calls to say. Any model works that has plain causal attention in every layer, in some of them in a sliding window,
through transformers' AttentionInterface.
"""

from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
)

from sglang_metasoft.config import shown
from sglang_metasoft.hf.layers import read_layers
from sglang_metasoft.hf.shape import longest_window, read_config, shape_of, windows
from sglang_metasoft.types import AttentionLayer

ATTENTION = "metasoft"
PREFILL_CHUNK_TOKENS = 1024
UNUSUAL = ("softcap", "s_aux")  # what transformers hands to attention that is not plain
# (layer, q [rows, H, t, d], k and v [rows, G, t, d], scale) -> output [rows, H, t, d]; q and k after RoPE
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
_answer: ContextVar[Callable] = ContextVar("answer")


class LayerKV(NamedTuple):
    """Entries of one prompt at one layer: ``[n, G, d]`` each."""

    key: torch.Tensor
    value: torch.Tensor


class Prefilled(NamedTuple):
    """A prompt's entries in all layers and the logits after its last token ``[vocabulary]``."""

    layers: list[LayerKV]
    logits: torch.Tensor


def _attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    unusual = [name for name in UNUSUAL if kwargs.get(name) is not None]
    window = kwargs.get("sliding_window")
    return _answer.get()(module.layer_idx, query, key, value, scale, unusual, window).transpose(1, 2), None


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)


def causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None = None
) -> torch.Tensor:
    """Attention of a sequence's last tokens ``[rows, H, t, d]`` to all of it, ``[rows, G, C + t, d]``.

    Args:
        window: a token sees itself and so many less one before it; None: all.
    """
    new, seen = q.shape[2], k.shape[2]
    mask = None
    if window is not None:
        hidden = max(0, seen - new - window + 1)  # from all of the new ones
        k, v, seen = k[:, :, hidden:], v[:, :, hidden:], seen - hidden
        mask = visible_in_window(new, seen, window, q.device)
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    if 1 < new < seen:
        mask = torch.ones(new, seen, dtype=torch.bool, device=q.device).tril(seen - new)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=new == seen, scale=scale, enable_gqa=True)


def visible_in_window(new: int, seen: int, window: int, device: torch.device) -> torch.Tensor:
    """``[new, seen]`` which of a sequence's tokens each of its last ones sees in a window."""
    visible = torch.ones(new, seen, dtype=torch.bool, device=device)
    return visible.tril(seen - new).triu(seen - new - window + 1)


def load_tokenizer(path: str | Path):
    """The model's tokenizer. Raises ValueError: there is none."""
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model path: {shown(str(path))} has no tokenizer that can be loaded: {error}") from None


class HFModel:
    """A causal LM whose weights never change; a :class:`sglang_metasoft.types.ServedModel`.

    Args:
        path: folder or hub id.
        device, dtype: where and in what the model runs; ``auto`` is the dtype of its files.
        tokenizer: of :func:`load_tokenizer`, if it is there already.

    Raises:
        ValueError: nothing that can be loaded is there, or not every layer has plain causal attention, or every one in
            a window. What the configuration does not tell is refused by the first run.
    """

    def __init__(self, path: str | Path, device: torch.device, dtype: torch.dtype | str, tokenizer=None) -> None:
        self.config = read_config(path)
        text = self.config.get_text_config(decoder=True)
        self.shape = shape_of(text, str(path))
        try:
            self.windows = windows(text)
        except ValueError as error:
            raise self._refusal(str(error)) from None
        self.tokenizer = tokenizer or load_tokenizer(path)
        try:
            # One that sees besides is run as its text part.
            is_text = type(self.config) in MODEL_FOR_CAUSAL_LM_MAPPING
            model_class = AutoModelForCausalLM if is_text else AutoModelForImageTextToText
            self.model = model_class.from_pretrained(path, dtype=dtype, attn_implementation=ATTENTION)
        except Exception as error:  # transformers, safetensors and torch have their own types
            raise ValueError(f"model path: {shown(str(path))} cannot be loaded: {error}") from None
        self.model.requires_grad_(False).eval().to(device)
        self.device, self.dtype = device, self.model.dtype
        self._layers: list[AttentionLayer] | None = None
        ends = self.model.generation_config.eos_token_id
        self.end_ids = {self.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}

    def tensor(self, ids: list) -> torch.Tensor:
        """int64, on the model's device."""
        return torch.tensor(ids, dtype=torch.int64, device=self.device)

    @torch.no_grad()
    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """``[n]`` ids to ``[n, D]`` embeddings."""
        return self.model.get_input_embeddings()(ids)

    def run(self, embeds: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Hidden states ``[rows, n, D]`` after the last layer.

        Args:
            embeds: ``[rows, n, D]``; what they need gradients for gets them.
            positions: ``[rows, n]``.
            attend: answers each layer's attention call, in order.

        Raises:
            ValueError: a layer's attention is not plain causal attention.
        """
        return self._call(self.model.get_decoder(), embeds, positions, attend).last_hidden_state

    def logits(self, embeds: torch.Tensor, positions: torch.Tensor, attend: Attend, last: int = 0) -> torch.Tensor:
        """The same, but the ``last`` tokens' logits ``[rows, last, vocabulary]`` in float32; 0: all tokens'."""
        return self._call(self.model, embeds, positions, attend, logits_to_keep=last).logits.float()

    def _call(self, module, embeds: torch.Tensor, positions: torch.Tensor, attend: Attend, **kwargs):
        layers: set[int] = set()

        def answer(layer: int, q, k, v, scale: float, unusual: list[str], window: int | None) -> torch.Tensor:
            if unusual:
                raise self._refusal(f"layer {layer} has {unusual[0]}")
            if window != self.windows[layer]:
                raise self._refusal(
                    f"layer {layer} has sliding_window {window}, its configuration says {self.windows[layer]}"
                )
            layers.add(layer)
            return attend(layer, q, k, v, scale)

        token = _answer.set(answer)
        try:
            out = module(inputs_embeds=embeds.to(self.dtype), position_ids=positions, use_cache=False, **kwargs)
        finally:
            _answer.reset(token)
        if len(layers) != self.shape.num_layers:
            raise self._refusal(f"{len(layers)} such layers found, {self.shape.num_layers} expected")
        return out

    def _refusal(self, why: str) -> ValueError:
        name = shown(self.shape.name)
        return ValueError(f"model path: {name}: allowed: models with plain causal attention in every layer; {why}")

    @torch.no_grad()
    def prefill(self, ids: list[int]) -> Prefilled:
        """Run a prompt from its first token, in chunks."""
        size = len(ids), self.shape.num_kv_heads, self.shape.head_dim
        empty = torch.empty(2, self.shape.num_layers, *size, dtype=self.dtype, device=self.device)
        layers = [LayerKV(key, value) for key, value in zip(*empty, strict=True)]
        for number, chunk in enumerate(self.tensor(ids).split(PREFILL_CHUNK_TOKENS)):
            logits = self._prefill_chunk(layers, chunk, number * PREFILL_CHUNK_TOKENS)
        return Prefilled(layers, logits)

    def _prefill_chunk(self, layers: list[LayerKV], ids: torch.Tensor, start: int) -> torch.Tensor:
        end = start + len(ids)

        def attend(layer, q, k, v, scale):
            for entries, new in zip(layers[layer], (k, v), strict=True):
                entries[start:end] = new[0].transpose(0, 1)
            key, value = (entries[:end].transpose(0, 1)[None] for entries in layers[layer])
            return causal_attention(q, key, value, scale, self.windows[layer])

        positions = torch.arange(start, end, device=self.device)
        return self.logits(self.embed(ids)[None], positions[None], attend, last=1)[0, -1]

    @property
    def full_layers(self) -> list[int]:
        """Numbers of the layers that see all tokens."""
        return [layer for layer, window in enumerate(self.windows) if window is None]

    @property
    def sliding_window_tokens(self) -> int | None:
        """The longest window; None: there is none."""
        return longest_window(self.config)

    def layers(self) -> list[AttentionLayer]:
        """The attention layers in order, and how the queries of each depend on their position; runs the model once."""
        if self._layers is None:
            self._layers = read_layers(self)
        return self._layers

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    @torch.no_grad()
    def queries(self, ids: torch.Tensor) -> list[torch.Tensor]:
        """For each layer ``[n, H, d]`` queries after RoPE of ``[n]`` token ids."""
        found: list[torch.Tensor] = []

        def attend(layer, q, k, v, scale):
            found.append(q[0].transpose(0, 1))
            return causal_attention(q, k, v, scale, self.windows[layer])

        self.run(self.embed(ids)[None], torch.arange(len(ids), device=self.device)[None], attend)
        return found
