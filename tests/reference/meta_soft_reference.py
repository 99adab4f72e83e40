"""Meta-Soft once more, on Hugging Face alone, written from the method's description; no code shared with the package.

Everything is dense and in float32: attention maps from eager attention, the whole affinity matrix, one head at a time.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache

from tests.reference.consolidation import carried_bias, flow, without_repeats

LAST_TOKENS = 64  # that the selector reads


@dataclass
class Cache:
    """What a prompt holds: the entries of its compressed segments, then raw ones. Steps make new ones of it."""

    ids: list[int]  # logical tokens
    layers: list[tuple[torch.Tensor, torch.Tensor]]  # keys and values, [G, entries, d]
    compressed_tokens: int = 0
    compressed_entries: int = 0


@dataclass
class Compressed:
    """One compressed span: a list over layers, of a list over KV heads or of tensors."""

    kept: list[list[list[int]]]  # counted from the span's start
    importance: list[torch.Tensor]  # [G, S]
    keys: list[torch.Tensor]  # [G, B, d]
    values: list[torch.Tensor]  # [G, B, d]
    contested: list[torch.Tensor]  # [G, B] bool: some dropped entry's last target is decided by a near tie
    raw: DynamicCache  # before
    cache: Cache  # after


class Reference:
    """The model in float32 and a compressor's folder."""

    def __init__(self, model_dir: Path, compressor_dir: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.sizes = json.loads((compressor_dir / "config.json").read_text())["sizes"]
        self.weights = load_file(compressor_dir / "model.safetensors")
        self.prefilled: dict[tuple, tuple[Cache, torch.Tensor]] = {}
        self.unturned: dict[tuple, list[torch.Tensor]] = {}

    def soft_tokens(self, span: list[int], tail: list[int]) -> torch.Tensor:
        """[k, D]; without a tail the span ends at a boundary, which has a bias of its own."""
        table = self.model.get_input_embeddings().weight
        features = []
        for ids in (span, (span + tail)[-LAST_TOKENS:]):
            mean = table[ids].mean(dim=0)
            features.append(mean / (mean.pow(2).mean() + torch.finfo(torch.float32).eps).sqrt())
        w = self.weights
        hidden = w["trunk.weight"] @ torch.cat(features) + w["trunk.bias"]
        hidden = hidden * torch.sigmoid(hidden)
        queries = (w["to_query.weight"] @ hidden + w["to_query.bias"]).reshape(self.sizes["count"], -1)
        soft = []
        for number, query in enumerate(queries):
            logits = w["row_keys"] @ query + w["bias"][int(not tail)][number]
            rows = sorted(range(len(logits)), key=lambda row: -logits[row].item())[: self.sizes["top"]]
            weights = torch.softmax(logits[rows], dim=0)
            soft.append(sum(weight * w["library"][row] for weight, row in zip(weights, rows, strict=True)))
        return w["norm"] * torch.stack(soft)

    def refined(
        self, layer: int, head: int, mass: torch.Tensor, k: torch.Tensor, v: torch.Tensor, at_boundary: bool
    ) -> torch.Tensor:
        """[S] importance of one head's entries: the probe's mass, read by the scorer for spans that end so."""
        if "scorer.out" not in self.weights:
            return mass
        w = {
            name.removeprefix("scorer."): tensor[int(at_boundary), layer, head]
            for name, tensor in self.weights.items()
            if name.startswith("scorer.")
        }
        half = k.shape[1] // 2
        near_mass, near_count = (
            torch.nn.functional.pad(x, (3, 3)).unfold(0, 7, 1).sum(dim=1) for x in (mass, torch.ones_like(mass))
        )
        own, near = (x.clamp(min=1e-9).log() for x in (mass, near_mass / near_count))
        own, near = own - own.mean(), near - near.mean()
        pairs = (k[:, :half].square() + k[:, half:].square()).sqrt()
        x = torch.cat([v, pairs, own[:, None], near[:, None]], dim=1)
        hidden = x @ w["hidden"] + w["hidden_bias"]
        hidden = hidden * torch.sigmoid(hidden)
        return torch.softmax(w["trust"] * own + w["neighbours"] * near + hidden @ w["out"], dim=0)

    def sees_a_window(self, layer: int) -> bool:
        """Whether only the last tokens matter there: transformers masks the others by their places in the cache."""
        kinds = getattr(self.model.config, "layer_types", None)
        return kinds is not None and kinds[layer] == "sliding_attention"

    @torch.no_grad()
    def directions(self, text_ids: list[int], position: int) -> list[torch.Tensor]:
        """For each layer [G, d]: u with q·u near 1, from the queries of a Llama before its rotary embedding."""
        cfg = self.model.config
        d = cfg.hidden_size // cfg.num_attention_heads
        theta = cfg.rope_parameters["rope_theta"]
        speed = torch.tensor([theta ** (-2 * i / d) for i in range(d // 2)], dtype=torch.float64)

        def turn(x, angle):
            a, b = x.double().split(d // 2, dim=-1)
            return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)

        def fit() -> list[torch.Tensor]:
            found, out = [], self.model(torch.tensor([text_ids]), output_hidden_states=True)
            for block, hidden in zip(self.model.model.layers, out.hidden_states, strict=False):
                queries = block.self_attn.q_proj(block.input_layernorm(hidden))[0, 16:]
                queries = queries.view(
                    -1, cfg.num_key_value_heads, cfg.num_attention_heads // cfg.num_key_value_heads, d
                )
                per_head = []
                for g in range(cfg.num_key_value_heads):
                    rows = torch.cat(
                        [turn(queries[:, g], ahead * speed) for ahead in (0, 16, 64, 256, 1024, 2048, 4096)]
                    ).reshape(-1, d)
                    gram = rows.T @ rows
                    ridge = 0.01 * gram.trace() / d * torch.eye(d, dtype=torch.float64)
                    per_head.append(torch.linalg.solve(gram + ridge, rows.sum(dim=0)))
                found.append(torch.stack(per_head))
            return found

        unturned = self.unturned.get(tuple(text_ids)) or self.unturned.setdefault(tuple(text_ids), fit())
        return [turn(u, position * speed).float() for u in unturned]

    @torch.no_grad()
    def prefill(self, ids: list[int]) -> Cache:
        """A new prompt, computed as one piece; computed once, whoever asks."""
        if tuple(ids) not in self.prefilled:
            self.prefilled[tuple(ids)] = self.extend(Cache([], []), ids)
        return self.prefilled[tuple(ids)][0]

    @torch.no_grad()
    def extend(self, cache: Cache, ids: list[int]) -> tuple[Cache, torch.Tensor]:
        """Compute more tokens at their logical positions, over what the cache holds; also [vocab] after the last."""
        start, held = len(cache.ids), _cache_of(cache.layers)
        positions = torch.arange(start, start + len(ids))
        out = self.model(torch.tensor([ids]), past_key_values=held, position_ids=positions[None], use_cache=True)
        layers = [(layer.keys[0].clone(), layer.values[0].clone()) for layer in out.past_key_values.layers]
        longer = Cache(cache.ids + ids, layers, cache.compressed_tokens, cache.compressed_entries)
        return longer, out.logits[0, -1].log_softmax(-1)

    def compress(
        self, ids: list[int], window: int, kept_entries: int, sink: int, targets: int,
        calibration: list[int] | None = None,
    ) -> Compressed:  # fmt: skip
        """A prompt's one span, up to its window, with all of the prompt in view."""
        return self.compress_span(self.prefill(ids), len(ids) - window, kept_entries, sink, targets, calibration)

    @torch.no_grad()
    def compress_span(
        self, cache: Cache, span_tokens: int, kept_entries: int, sink: int, targets: int,
        calibration: list[int] | None = None, at_boundary: bool = False,
    ) -> Compressed:  # fmt: skip
        """Probe, partition, consolidate the first raw tokens: by attention flow, or by key biases, given a text.

        Args:
            calibration: the text that key biases are calibrated on.
            at_boundary: the span is probed as if nothing followed it.
        """
        before, end = cache.compressed_entries, cache.compressed_entries + span_tokens
        span = cache.ids[cache.compressed_tokens :][:span_tokens]
        tail = [] if at_boundary else cache.ids[cache.compressed_tokens + span_tokens :]
        position = cache.compressed_tokens + len(span) + len(tail)
        soft = self.soft_tokens(span, tail)
        count = len(soft)
        probe = self.model(
            inputs_embeds=soft[None],
            past_key_values=_cache_of([(k[:, : end + len(tail)], v[:, : end + len(tail)]) for k, v in cache.layers]),
            position_ids=torch.arange(position, position + count)[None],
            output_attentions=True,
        )
        after = Cache(cache.ids, [], cache.compressed_tokens + span_tokens, before + kept_entries)
        result = Compressed([], [], [], [], [], _cache_of(cache.layers), after)
        directions = self.directions(calibration, position) if calibration else None
        for number, (attention, (all_keys, all_values)) in enumerate(zip(probe.attentions, cache.layers, strict=True)):
            keys, values = all_keys[:, before:end], all_values[:, before:end]
            groups, _, d = keys.shape
            if self.sees_a_window(number):
                last = list(range(span_tokens - kept_entries, span_tokens))
                stays = torch.zeros(groups, span_tokens)
                stays[:, last] = 1
                result.importance.append(stays)
                result.kept.append([last] * groups)
                result.contested.append(torch.zeros(groups, kept_entries, dtype=torch.bool))
                result.keys.append(keys[:, last])
                result.values.append(values[:, last])
                after.layers.append(tuple(torch.cat([x[:, :before], x[:, before + last[0] :]], dim=1)
                                          for x in (all_keys, all_values)))  # fmt: skip
                continue
            per_group = attention[0].reshape(groups, -1, count, attention.shape[-1]).mean(dim=(1, 2))
            mass = per_group[:, before:end]
            rank = torch.stack(
                [self.refined(number, g, mass[g], keys[g], values[g], at_boundary) for g in range(groups)]
            )
            if calibration:
                mass = (mass * rank).sqrt() if "scorer.out" in self.weights else mass
                rank = torch.stack([without_repeats(span, row) for row in rank])
            result.importance.append(rank)
            kept_per_head, new_keys, new_values, contested_per_head = [], [], [], []
            for g in range(groups):
                worth = rank[g].tolist()
                by_rank = sorted(range(sink, span_tokens), key=lambda i: (-worth[i], i))
                kept = sorted(list(range(sink)) + by_rank[: kept_entries - sink])
                k, v, a = keys[g], values[g], mass[g]
                if calibration:
                    bias = carried_bias(span, a, kept, sink)
                    new_keys.append(k[kept] + bias[:, None] * d**0.5 * directions[number][g])
                    new_values.append(v[kept])
                    contested_per_head.append(torch.zeros(len(kept), dtype=torch.bool))
                else:
                    scale = getattr(self.model.config, "attention_multiplier", d**-0.5)  # Granite has one of its own
                    merged, contested = flow(self.weights["gate_scale"][number, g], k, v, a, kept, targets, scale)
                    new_keys.append(k[kept])
                    new_values.append(merged)
                    contested_per_head.append(contested)
                kept_per_head.append(kept)
            result.kept.append(kept_per_head)
            result.contested.append(torch.stack(contested_per_head))
            result.keys.append(torch.stack(new_keys))
            result.values.append(torch.stack(new_values))
            after.layers.append(
                tuple(
                    torch.cat([x[:, :before], new, x[:, end:]], dim=1)
                    for x, new in ((all_keys, result.keys[-1]), (all_values, result.values[-1]))
                )
            )
        return result

    def next_token_logprobs(self, ids: list[int], span_len: int, compressed: Compressed) -> torch.Tensor:
        """[vocab] after the last prompt token, recomputed over the compressed span and the raw window before it."""
        cache = compressed.cache
        layers = [(k[:, :-1], v[:, :-1]) for k, v in cache.layers]
        assert cache.ids == ids and cache.compressed_tokens == span_len
        return self.extend(Cache(ids[:-1], layers, span_len, cache.compressed_entries), ids[-1:])[1]


def _cache_of(layers: list[tuple[torch.Tensor, torch.Tensor]]) -> DynamicCache:
    cache = DynamicCache()
    for number, (keys, values) in enumerate(layers):
        cache.update(keys[None].clone(), values[None].clone(), number)
    return cache
