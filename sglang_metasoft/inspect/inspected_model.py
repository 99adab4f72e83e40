"""The model as inspection asks it: what compression does to a prompt at each layer, and answers before and after."""

import logging
from pathlib import Path
from typing import NamedTuple

import torch

from sglang_metasoft.config import AUTO, METHODS, MetaSoftConfig
from sglang_metasoft.hf.cache import Batch, generate, joined
from sglang_metasoft.hf.compress import compress, probe_of
from sglang_metasoft.hf.model import HFModel, LayerKV
from sglang_metasoft.hf.shape import kv_bytes_per_entry
from sglang_metasoft.methods import load_method
from sglang_metasoft.methods.auto import serve
from sglang_metasoft.methods.base import Method
from sglang_metasoft.types import MergedKV, Plan, Routes

logger = logging.getLogger(__name__)


class CompressedLayer(NamedTuple):
    """What became of the span at one layer."""

    importance: torch.Tensor  # [G, S] float32
    routes: Routes
    merged: MergedKV
    gate_scale: torch.Tensor  # [G] float32
    is_window: bool  # the last entries stay; their importance is their place


class Answer(NamedTuple):
    """A greedy continuation."""

    ids: list[int]  # an end-of-text token included
    is_ended: bool  # by such a token, not by the limit
    score: float  # mean log-probability of the reference answer's tokens over this cache


class InspectedModel(HFModel):
    """A causal LM, on the accelerator if there is one.

    There in the dtype of its files, on a CPU in float32: half precision takes several times as long on most.

    Args:
        path: folder or hub id, with configuration and weights.
        tokenizer: of :func:`sglang_metasoft.hf.model.load_tokenizer`.

    Raises:
        ValueError: nothing that can be loaded is there.
    """

    def __init__(self, path: str | Path, tokenizer) -> None:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        dtype = "auto" if accelerator else torch.float32
        super().__init__(path, accelerator or torch.device("cpu"), dtype, tokenizer)

    @property
    def kv_bytes_per_entry(self) -> int:
        """Of keys and values, all layers and heads, in the dtype of the model's files, as on a server."""
        return kv_bytes_per_entry(self.shape, self.config.dtype or torch.float32)

    def make_method(self, config: MetaSoftConfig) -> Method:
        """The configured method for this model. Raises ValueError: it cannot serve it, or needs a server to start."""
        allowed = [
            name for name in METHODS if load_method(name).needs_probe and load_method(name).prepare is Method.prepare
        ]
        if config.method not in (AUTO, *allowed):
            raise ValueError(f"method {config.method!r} cannot be inspected; allowed: one of: {', '.join(allowed)}")
        served = serve(config, self.shape, self.embed, self.device, self)
        for warning in served.warnings:
            logger.warning("%s", warning)
        return served.method

    def compress(self, entries: list[LayerKV], ids: list[int], plan: Plan, method: Method) -> list[CompressedLayer]:
        """Probe the prompt and compress its span; the entries are only read.

        Raises:
            ValueError: a layer's attention is not plain causal attention.
        """
        recorder = _Recorder(method)
        probe = probe_of(self, ids, plan, method)
        (found,) = compress(self, entries, probe, [plan], recorder)
        layers, groups = [], self.shape.num_kv_heads
        scored = iter(recorder.importance)
        for layer, (routes, merged) in enumerate(found):
            is_window = self.windows[layer] is not None
            if not is_window:
                importance = method.consolidation.rank(next(scored), probe)
            else:
                importance = torch.arange(plan.span_tokens, device=self.device).expand(groups, -1) / plan.span_tokens
            gate = torch.as_tensor(method.gate_scale(layer, 0, groups), dtype=torch.float32, device="cpu")
            layers.append(CompressedLayer(importance, routes, merged, gate.flatten().expand(groups), is_window))
        return layers

    def compressed_cache(self, entries: list[LayerKV], plan: Plan, layers: list[CompressedLayer]) -> list[LayerKV]:
        """The consolidated entries, then the raw ones after the span."""
        return [joined(layer.merged, raw, plan.end_slots) for layer, raw in zip(layers, entries, strict=True)]

    def answer(
        self, entries: list[LayerKV], prompt_tokens: int, first: torch.Tensor, limit: int, reference: list[int] | None
    ) -> Answer:
        """Continue greedily over ``entries``.

        Args:
            prompt_tokens: logical length of the prompt; positions go on from there.
            first: ``[vocab]`` logits of the first token, from the raw cache, as on the server.
            limit: tokens at most.
            reference: answer whose tokens are scored; None: this one.
        """
        batch = Batch(self, [entries], limit)
        (ids,) = generate(batch, [int(first.argmax())], prompt_tokens, limit)
        scored = reference or ids
        total = first.log_softmax(-1)[scored[0]].item()
        if len(scored) > 1:
            again = Batch(self, [entries], len(scored)).extend(self.tensor([scored[:-1]]), prompt_tokens)
            total += again[0].log_softmax(-1).gather(1, self.tensor(scored[1:])[:, None]).sum().item()
        return Answer(ids, ids[-1] in self.end_ids, total / len(scored))


class _Recorder:
    """A method that remembers the importance of every layer."""

    def __init__(self, method: Method) -> None:
        self._method = method
        self.importance: list[torch.Tensor] = []

    def __getattr__(self, name: str):
        return getattr(self._method, name)

    def score_layer(self, view):
        scores = self._method.score_layer(view)
        self.importance.append(scores.importance.nan_to_num(0.0, 0.0, 0.0))
        return scores
