"""Meta-Soft once more, on Hugging Face alone, written from the method's description; no code shared with the package.

Everything is dense and in float32: attention maps from eager attention, the whole affinity matrix, one head at a time.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache

NEAR_TIE = 5e-4
LAST_TOKENS = 64  # that the selector reads
E4 = 2.718281828459045**4


@dataclass
class Compressed:
    """One prompt's compressed cache: a list over layers, of a list over KV heads or of tensors."""

    kept: list[list[list[int]]]
    importance: list[torch.Tensor]  # [G, S]
    keys: list[torch.Tensor]  # [G, B, d]
    values: list[torch.Tensor]  # [G, B, d]
    contested: list[torch.Tensor]  # [G, B] bool: some dropped entry's last target is decided by less than NEAR_TIE
    raw: DynamicCache


class Reference:
    """The model in float32 and a compressor's folder."""

    def __init__(self, model_dir: Path, compressor_dir: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.sizes = json.loads((compressor_dir / "config.json").read_text())["sizes"]
        self.weights = load_file(compressor_dir / "model.safetensors")

    def soft_tokens(self, span: list[int], tail: list[int]) -> torch.Tensor:
        """[k, D]"""
        table = self.model.get_input_embeddings().weight
        features = []
        for ids in (span, (span + tail)[-LAST_TOKENS:]):
            mean = torch.stack([table[i] for i in ids]).mean(dim=0)
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

    def refined(self, layer: int, head: int, mass: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """[S] importance of one head's entries in a prompt with its question: the probe's mass, read by the scorer."""
        if "scorer.out" not in self.weights:
            return mass
        w = {
            name.removeprefix("scorer."): tensor[0, layer, head]
            for name, tensor in self.weights.items()
            if name.startswith("scorer.")
        }
        span, half = len(mass), k.shape[1] // 2
        around = torch.stack([mass[max(0, i - 3) : i + 4].mean() for i in range(span)])
        own, near = (x.clamp(min=1e-9).log() for x in (mass, around))
        own, near = own - own.mean(), near - near.mean()
        pairs = (k[:span, :half].square() + k[:span, half:].square()).sqrt()
        x = torch.cat([v[:span], pairs, own[:, None], near[:, None]], dim=1)
        hidden = x @ w["hidden"] + w["hidden_bias"]
        hidden = hidden * torch.sigmoid(hidden)
        return torch.softmax(w["trust"] * own + w["neighbours"] * near + hidden @ w["out"], dim=0)

    @torch.no_grad()
    def directions(self, text_ids: list[int], position: int) -> list[torch.Tensor]:
        """For each layer [G, d]: u with q·u near 1, from the queries of a Llama before its rotary embedding."""
        cfg, out = self.model.config, self.model(torch.tensor([text_ids]), output_hidden_states=True)
        d, found = cfg.hidden_size // cfg.num_attention_heads, []
        theta = cfg.rope_parameters["rope_theta"]
        speed = torch.tensor([theta ** (-2 * i / d) for i in range(d // 2)], dtype=torch.float64)

        def turn(x, angle):
            a, b = x.double().split(d // 2, dim=-1)
            return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)

        for block, hidden in zip(self.model.model.layers, out.hidden_states, strict=False):
            queries = block.self_attn.q_proj(block.input_layernorm(hidden))[0, 16:]
            queries = queries.view(-1, cfg.num_key_value_heads, cfg.num_attention_heads // cfg.num_key_value_heads, d)
            per_head = []
            for g in range(cfg.num_key_value_heads):
                rows = torch.cat([turn(queries[:, g], ahead * speed) for ahead in (0, 16, 64, 256, 1024, 2048, 4096)])
                rows = rows.reshape(-1, d)
                gram = rows.T @ rows
                ridge = 0.01 * gram.trace() / d * torch.eye(d, dtype=torch.float64)
                u = torch.linalg.solve(gram + ridge, rows.sum(dim=0))
                per_head.append(turn(u, position * speed).float())
            found.append(torch.stack(per_head))
        return found

    @staticmethod
    def without_repeats(ids: list[int], rank: torch.Tensor) -> torch.Tensor:
        """[S] importance of one head: of entries with the same last three tokens one counts for most of all."""
        groups, result = {}, rank.clone()
        for i in range(len(rank)):
            groups.setdefault(tuple(ids[i - 2 : i + 1]) or i, []).append(i)
        for members in groups.values():
            best = sorted(members, key=lambda i: (-rank[i].item(), i))
            for place, i in enumerate(best):
                result[i] = rank[i] / (place + 1) if place else (rank[i] * rank[members].sum()).sqrt()
        return result

    @staticmethod
    def bias(ids: list[int], mass: torch.Tensor, kept: list[int], sink: int) -> torch.Tensor:
        """[B] what one head's kept entries carry: mass of the same three tokens, of the same token, half the rest."""
        stay = kept[sink:]
        by_three, by_token = {}, {}
        for i in stay:
            by_three.setdefault(tuple(ids[i - 2 : i + 1]) or i, []).append(i)
            by_token.setdefault(ids[i], []).append(i)
        carried, rest = {i: mass[i].item() for i in stay}, 0.0
        for i in sorted(set(range(sink, len(mass))) - set(stay)):
            heirs = by_three.get(tuple(ids[i - 2 : i + 1]) or i) or by_token.get(ids[i], [])
            total = sum(mass[j].item() for j in heirs)
            for j in heirs:
                carried[j] += mass[i].item() * mass[j].item() / total
            rest += 0.0 if heirs else mass[i].item()
        more = 1 + 0.5 * rest / sum(carried.values())
        shares = [1.0] * sink + [carried[i] * more / mass[i].item() for i in stay]
        return torch.tensor(shares).clamp(min=1, max=E4).log()

    @torch.no_grad()
    def compress(
        self, ids: list[int], window: int, kept_entries: int, sink: int, targets: int,
        calibration: list[int] | None = None,
    ) -> Compressed:  # fmt: skip
        """Prefill, probe, partition, consolidate: by attention flow, or by key biases, given a text to calibrate on."""
        span_len = len(ids) - window
        raw = self.model(torch.tensor([ids]), use_cache=True).past_key_values
        layers = [(layer.keys[0].clone(), layer.values[0].clone()) for layer in raw.layers]  # [G, L, d]
        soft = self.soft_tokens(ids[:span_len], ids[span_len:])
        count = len(soft)
        probe = self.model(
            inputs_embeds=soft[None],
            past_key_values=_cache_of(layers),
            position_ids=torch.arange(len(ids), len(ids) + count)[None],
            output_attentions=True,
        )
        result = Compressed([], [], [], [], [], _cache_of(layers))
        directions = self.directions(calibration, len(ids)) if calibration else None
        for number, (attention, (keys, values)) in enumerate(zip(probe.attentions, layers, strict=True)):
            groups, _, d = keys.shape
            per_group = attention[0].reshape(groups, -1, count, attention.shape[-1]).mean(dim=(1, 2))
            mass = per_group[:, :span_len]
            rank = torch.stack([self.refined(number, g, mass[g], keys[g], values[g]) for g in range(groups)])
            if calibration:
                mass = (mass * rank).sqrt() if "scorer.out" in self.weights else mass
                rank = torch.stack([self.without_repeats(ids, row) for row in rank])
            result.importance.append(rank)
            kept_per_head, new_keys, new_values, contested_per_head = [], [], [], []
            for g in range(groups):
                by_rank = sorted(range(sink, span_len), key=lambda i: (-rank[g, i].item(), i))
                kept = sorted(list(range(sink)) + by_rank[: kept_entries - sink])
                dropped = sorted(set(range(span_len)) - set(kept))
                k, v, a = keys[g], values[g], mass[g]
                if calibration:
                    bias = self.bias(ids, a, kept, sink)
                    kept_per_head.append(kept)
                    new_keys.append(k[kept] + bias[:, None] * d**0.5 * directions[number][g])
                    new_values.append(v[kept])
                    contested_per_head.append(torch.zeros(len(kept), dtype=torch.bool))
                    continue
                affinity = k[dropped] @ k[kept].T / d**0.5
                routing = torch.zeros_like(affinity)
                contested = torch.zeros(len(kept), dtype=torch.bool)
                for row in range(len(dropped)):
                    order = affinity[row].argsort(descending=True)
                    best, last, next_best = order[:targets], order[targets - 1], order[targets]
                    if affinity[row, last] - affinity[row, next_best] < NEAR_TIE:
                        contested[last] = contested[next_best] = True
                    routing[row, best] = torch.softmax(affinity[row, best], dim=0)
                load = routing.sum(dim=0)
                flow = (routing / (load + 1e-6)).T @ v[dropped]
                moved = routing.T @ a[dropped]
                gate = self.weights["gate_scale"][number, g] * moved / (a[kept] + moved)
                kept_per_head.append(kept)
                new_keys.append(k[kept])
                new_values.append(v[kept] + gate[:, None] * (flow - v[kept]))
                contested_per_head.append(contested)
            result.kept.append(kept_per_head)
            result.contested.append(torch.stack(contested_per_head))
            result.keys.append(torch.stack(new_keys))
            result.values.append(torch.stack(new_values))
        return result

    @torch.no_grad()
    def next_token_logprobs(self, ids: list[int], span_len: int, compressed: Compressed) -> torch.Tensor:
        """[vocab] after the last prompt token, recomputed over the compressed span and the raw window before it."""
        window = slice(span_len, len(ids) - 1)
        layers = [
            (torch.cat([k, raw.keys[0][:, window]], dim=1), torch.cat([v, raw.values[0][:, window]], dim=1))
            for k, v, raw in zip(compressed.keys, compressed.values, compressed.raw.layers, strict=True)
        ]
        out = self.model(
            torch.tensor([ids[-1:]]),
            past_key_values=_cache_of(layers),
            position_ids=torch.tensor([[len(ids) - 1]]),
        )
        return out.logits[0, -1].log_softmax(-1)


def _cache_of(layers: list[tuple[torch.Tensor, torch.Tensor]]) -> DynamicCache:
    cache = DynamicCache()
    for number, (keys, values) in enumerate(layers):
        cache.update(keys[None].clone(), values[None].clone(), number)
    return cache
