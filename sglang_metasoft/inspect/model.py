"""A Hugging Face causal LM, compressed by the same stages as on the server: its cache stands in for the pool."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, DynamicCache

from sglang_metasoft.config import METHODS, MetaSoftConfig, shown
from sglang_metasoft.hf.shape import kv_bytes_per_entry, read_config, read_shape
from sglang_metasoft.pipeline import compress_layer
from sglang_metasoft.probe import make_probe
from sglang_metasoft.repeats import favour_one_of_each
from sglang_metasoft.rope import read_rope
from sglang_metasoft.score import load_method
from sglang_metasoft.score.base import Method
from sglang_metasoft.types import Job, LayerPool, MergedKV, Plan, Prompt, Rope, Routes

PROBE_ATTENTION = "metasoft_probe"
PREFILL_CHUNK_TOKENS = 1024

AnswerAttention = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]


class CompressedLayer(NamedTuple):
    """What became of the span at one layer."""

    importance: torch.Tensor  # [G, S] float32
    routes: Routes
    merged: MergedKV
    gate_scale: torch.Tensor  # [G] float32


class Answer(NamedTuple):
    """A greedy continuation."""

    ids: list[int]  # an end-of-text token included
    is_ended: bool  # by such a token, not by the limit
    score: float  # mean log-probability of the reference answer's tokens over this cache


def load_tokenizer(folder: str | Path):
    """The model's tokenizer. Raises ValueError: there is none."""
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model path: {shown(str(folder))} has no tokenizer that can be loaded: {error}") from None


class InspectedModel:
    """A causal LM, on the accelerator if there is one.

    There in the dtype of its files, on a CPU in float32: half precision takes several times as long on most.

    Args:
        folder: with configuration and weights.
        tokenizer: of :func:`load_tokenizer`.

    Raises:
        ValueError: nothing that can be loaded is there.
    """

    def __init__(self, folder: str | Path, tokenizer) -> None:
        self.tokenizer = tokenizer
        self.shape = read_shape(folder)
        self.stored_dtype = read_config(folder).dtype or torch.float32
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        self.device = accelerator or torch.device("cpu")
        try:
            self.model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto" if accelerator else torch.float32)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"model path: {shown(str(folder))} cannot be loaded: {error}") from None
        self.model.eval().to(self.device)

    @property
    def kv_bytes_per_entry(self) -> int:
        """Of keys and values, all layers and heads, in the dtype of the model's files, as on a server."""
        return kv_bytes_per_entry(self.shape, self.stored_dtype)

    def make_method(self, config: MetaSoftConfig) -> Method:
        """The configured method for this model. Raises ValueError: it cannot serve it, or needs a server to start."""
        served = [
            name for name in METHODS if load_method(name).needs_probe and load_method(name).prepare is Method.prepare
        ]
        if config.method not in served:
            raise ValueError(f"method {config.method!r} cannot be inspected; allowed: one of: {', '.join(served)}")
        method = load_method(config.method)(config, self.shape, self._embed, self.device)
        method.prepare(self)
        return method

    def rope(self) -> Rope:
        """As :class:`sglang_metasoft.types.ServedModel` has it."""
        return read_rope(self.model)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    @torch.no_grad()
    def queries(self, ids: torch.Tensor) -> list[torch.Tensor]:
        """For each layer ``[n, H, d]`` queries after RoPE of ``[n]`` token ids."""
        found: list[torch.Tensor] = []

        def answer(layer: int, q, k, v, scale: float) -> torch.Tensor:
            found.append(q)
            by_head = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
            out = scaled_dot_product_attention(*by_head, is_causal=True, scale=scale, enable_gqa=True)
            return out[0].transpose(0, 1)

        with self._attention(answer):
            self.model.get_decoder()(input_ids=ids[None], use_cache=False)
        return found

    def _tensor(self, values: list) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.model.get_input_embeddings()(ids)

    @torch.no_grad()
    def prefill(self, ids: list[int]) -> tuple[DynamicCache, torch.Tensor]:
        """The raw cache of a prompt, and the ``[vocab]`` log-probabilities of what follows it."""
        cache = DynamicCache()
        for chunk in self._tensor([ids]).split(PREFILL_CHUNK_TOKENS, dim=1):
            out = self.model(chunk, past_key_values=cache, logits_to_keep=1)
        return cache, out.logits[0, -1].float().log_softmax(-1)

    @torch.no_grad()
    def compress(
        self, cache: DynamicCache, ids: list[int], plan: Plan, method: Method, config: MetaSoftConfig
    ) -> list[CompressedLayer]:
        """Probe the prompt and compress its span; the cache is only read.

        Raises:
            ValueError: a layer's attention is not plain causal attention.
        """
        end = plan.end_slots
        prompt = Prompt(
            span_ids=self._tensor(ids[plan.start_slots : end]),
            tail_ids=self._tensor(ids[end:]),
            context_slots=len(ids),
            context_tokens=len(ids),
        )
        probe = make_probe(method, prompt, config)
        slots = torch.arange(len(ids), device=self.device)
        job = Job(plan, probe, slots[: probe.context_slots], slots[plan.start_slots : end], slots[: plan.kept_slots])
        recorder = _Recorder(method)
        layers: list[CompressedLayer] = []

        def answer(layer: int, q, k, v, scale: float) -> torch.Tensor:
            raw = cache.layers[layer]
            pool = LayerPool(raw.keys[0].transpose(0, 1), raw.values[0].transpose(0, 1), scale, 1.0, 1.0)
            gate = method.gate_scale(layer, 0, self.shape.num_kv_heads)
            out, routes, merged, _ = compress_layer(job, q, k, v, pool, recorder, config, gate, layer)
            gates = torch.as_tensor(gate, dtype=torch.float32, device="cpu").flatten().expand(self.shape.num_kv_heads)
            importance = recorder.importance
            if probe.carrying is not None:
                importance = favour_one_of_each(importance, probe.carrying.repeats[0])
            layers.append(CompressedLayer(importance, routes, merged, gates))
            return out

        positions = torch.arange(probe.embeds.shape[0], device=self.device) + probe.first_position
        with self._attention(answer):
            self.model.get_decoder()(
                inputs_embeds=probe.embeds[None].to(self.model.dtype), position_ids=positions[None], use_cache=False
            )
        if len(layers) != self.shape.num_layers:
            raise ValueError(
                f"model path: {self.shape.name!r}: {len(layers)} plain attention layers found, "
                f"{self.shape.num_layers} expected; inspect takes models with attention in every layer"
            )
        return layers

    @contextlib.contextmanager
    def _attention(self, answer: AnswerAttention) -> Iterator[None]:
        """Let ``answer`` compute every attention layer: ``[t, H, d]`` from the queries, keys and values of t tokens."""

        def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
            unusual = [name for name in ("sliding_window", "softcap", "s_aux") if kwargs.get(name) is not None]
            if unusual:
                raise ValueError(
                    f"model path: {self.shape.name!r}: layer {module.layer_idx} has {unusual[0]}; inspect takes "
                    "models with plain causal attention"
                )
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
            return answer(module.layer_idx, q.contiguous(), k, v, scale)[None], None

        AttentionInterface.register(PROBE_ATTENTION, attention)
        before = self.model.config._attn_implementation
        self.model.set_attn_implementation(PROBE_ATTENTION)
        try:
            yield
        finally:
            self.model.set_attn_implementation(before)

    def compressed_cache(self, cache: DynamicCache, plan: Plan, layers: list[CompressedLayer]) -> DynamicCache:
        """The consolidated entries, then the raw ones after the span."""
        new = DynamicCache()
        for number, (raw, layer) in enumerate(zip(cache.layers, layers, strict=True)):
            pairs = ((layer.merged.key, raw.keys), (layer.merged.value, raw.values))
            new.update(
                *(torch.cat([kept.transpose(0, 1)[None], old[:, :, plan.end_slots :]], dim=2) for kept, old in pairs),
                number,
            )
        return new

    @torch.no_grad()
    def answer(
        self, cache: DynamicCache, prompt_tokens: int, first: torch.Tensor, limit: int, reference: list[int] | None
    ) -> Answer:
        """Continue greedily over a copy of ``cache``.

        Args:
            prompt_tokens: logical length of the prompt; positions go on from there.
            first: ``[vocab]`` log-probabilities of the first token, from the raw cache, as on the server.
            limit: tokens at most.
            reference: answer whose tokens are scored; None: this one.
        """
        ids, ended = [int(first.argmax())], False
        copy = _copy_of(cache)
        ends = _end_ids(self.model)
        while len(ids) < limit and not (ended := ids[-1] in ends):
            position = self._tensor([[prompt_tokens + len(ids) - 1]])
            out = self.model(self._tensor([ids[-1:]]), past_key_values=copy, position_ids=position)
            ids.append(int(out.logits[0, -1].argmax()))
        scored = reference or ids
        total = first[scored[0]].item()
        if len(scored) > 1:
            positions = self._tensor([list(range(prompt_tokens, prompt_tokens + len(scored) - 1))])
            out = self.model(self._tensor([scored[:-1]]), past_key_values=_copy_of(cache), position_ids=positions)
            logprobs = out.logits[0].float().log_softmax(-1)
            total += logprobs.gather(1, self._tensor(scored[1:])[:, None]).sum().item()
        return Answer(ids, ended or ids[-1] in ends, total / len(scored))


class _Recorder:
    """A method that remembers the importance of the layer it scored last."""

    def __init__(self, method: Method) -> None:
        self._method = method

    def __getattr__(self, name: str):
        return getattr(self._method, name)

    def score_layer(self, view):
        scores = self._method.score_layer(view)
        self.importance = scores.importance.nan_to_num(0.0, 0.0, 0.0)
        return scores


def _copy_of(cache: DynamicCache) -> DynamicCache:
    copy = DynamicCache()
    for number, layer in enumerate(cache.layers):
        copy.update(layer.keys, layer.values, number)  # concatenation on update leaves the original alone
    return copy


def _end_ids(model) -> set[int]:
    end = model.generation_config.eos_token_id
    return set(end if isinstance(end, list) else [] if end is None else [end])
