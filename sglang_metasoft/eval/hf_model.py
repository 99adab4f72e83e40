"""A Hugging Face causal LM whose attention calls are answered by this project: prompts, probes and batches of caches.

Any model works whose attention goes through transformers' AttentionInterface. Attention functions get
``[1 or rows, heads, tokens, d]`` tensors after RoPE; what they attend to is theirs to say.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from sglang_metasoft.rope import read_rope
from sglang_metasoft.types import ModelShape, Rope

ATTENTION = "metasoft_eval"
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]


class LayerKV(NamedTuple):
    """Entries of one layer: ``[n, G, d]`` each."""

    key: torch.Tensor
    value: torch.Tensor


class Prefilled(NamedTuple):
    """A prompt's entries in all layers and the logits after its last token ``[vocabulary]``."""

    layers: list[LayerKV]
    logits: torch.Tensor


def _attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, *, metasoft_attend, **kwargs):
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return metasoft_attend(module.layer_idx, query, key, value, scaling).transpose(1, 2), None


class HFModel:
    """The model and what evaluation asks of it.

    Args:
        path: folder of the model.
        dtype: of weights and entries.

    Raises:
        ValueError: no model there, or one without rotary causal attention.
    """

    def __init__(self, path: Path, dtype: torch.dtype, device: torch.device) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path)
            self.model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()
        except (OSError, ValueError) as error:
            raise ValueError(f"--model: {str(path)!r} cannot be loaded: {error}") from None
        AttentionInterface.register(ATTENTION, _attention)
        AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)
        self.model.config._attn_implementation = ATTENTION
        self.device = device
        cfg = self.model.config
        head_dim = getattr(cfg, "head_dim", None) or cfg.hidden_size // cfg.num_attention_heads
        self.shape = ModelShape(
            str(path), cfg.vocab_size, cfg.hidden_size, cfg.num_hidden_layers,
            cfg.num_attention_heads, cfg.num_key_value_heads, head_dim,
        )  # fmt: skip
        ends = self.model.generation_config.eos_token_id
        self.end_ids = {self.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}

    @torch.no_grad()
    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """``[n]`` ids to ``[n, D]`` embeddings."""
        return self.model.get_input_embeddings()(ids)

    @torch.no_grad()
    def run(self, embeds: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Hidden states ``[rows, n, D]`` after the last layer; ``positions`` is ``[rows, n]``."""
        return self.model.get_decoder()(
            inputs_embeds=embeds, position_ids=positions, use_cache=False, metasoft_attend=attend
        ).last_hidden_state

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of hidden states, float32."""
        return self.model.get_output_embeddings()(hidden).float()

    def prefill(self, ids: list[int]) -> Prefilled:
        """Run a prompt from its first token."""
        layers: list[LayerKV] = []

        def attend(layer, q, k, v, scale):
            layers.append(LayerKV(k[0].transpose(0, 1), v[0].transpose(0, 1)))
            return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)

        positions = torch.arange(len(ids), device=self.device)[None]
        embeds = self.embed(torch.tensor(ids, device=self.device))[None]
        hidden = self.run(embeds, positions, attend)
        return Prefilled(layers, self.logits(hidden[0, -1]))

    def rope(self) -> Rope:
        """The rotary embedding, as :class:`sglang_metasoft.types.ServedModel` has it."""
        return read_rope(self.model)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def queries(self, ids: torch.Tensor) -> list[torch.Tensor]:
        """For each layer ``[n, H, d]`` queries after RoPE of ``[n]`` token ids."""
        found: list[torch.Tensor] = []

        def attend(layer, q, k, v, scale):
            found.append(q[0].transpose(0, 1))
            return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)

        self.run(self.embed(ids)[None], torch.arange(len(ids), device=self.device)[None], attend)
        return found


class Batch:
    """Caches of different lengths that are continued together.

    Args:
        rows: for each row its entries in all layers.
        room: tokens that may be added.
    """

    def __init__(self, model: HFModel, rows: list[list[LayerKV]], room: int) -> None:
        self.model = model
        lengths = [row[0].key.shape[0] for row in rows]
        self.used = max(lengths)
        shape = (len(rows), model.shape.num_kv_heads, self.used + room, model.shape.head_dim)
        first = rows[0][0].key
        self.keys = [first.new_zeros(shape) for _ in rows[0]]
        self.values = [first.new_zeros(shape) for _ in rows[0]]
        for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            for layer, kv in enumerate(row):
                self.keys[layer][number, :, self.used - length : self.used] = kv.key.transpose(0, 1)
                self.values[layer][number, :, self.used - length : self.used] = kv.value.transpose(0, 1)
        place = torch.arange(self.used + room, device=first.device)
        self.visible = place >= self.used - torch.tensor(lengths, device=first.device)[:, None]

    def extend(self, ids: torch.Tensor, position: int) -> torch.Tensor:
        """Add ``[rows, n]`` tokens at logical ``position``; hidden states ``[rows, n, D]``."""
        rows, count = ids.shape
        start, self.used = self.used, self.used + count
        place = torch.arange(self.used, device=ids.device)
        causal = place <= start + torch.arange(count, device=ids.device)[:, None]
        mask = self.visible[:, None, : self.used] & causal

        def attend(layer, q, k, v, scale):
            keys, values = self.keys[layer], self.values[layer]
            keys[:, :, start : self.used], values[:, :, start : self.used] = k, v
            groups = k.shape[1]
            per_group = q.shape[1] // groups
            q = q.reshape(rows, groups, per_group * count, -1)
            out = scaled_dot_product_attention(
                q, keys[:, :, : self.used], values[:, :, : self.used],
                attn_mask=mask[:, None].expand(-1, 1, -1, -1).repeat(1, 1, per_group, 1), scale=scale,
            )  # fmt: skip
            return out.reshape(rows, groups * per_group, count, -1)

        positions = torch.arange(position, position + count, device=ids.device).expand(rows, -1)
        return self.model.run(self.model.embed(ids), positions, attend)

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows only."""
        self.keys = [key[rows] for key in self.keys]
        self.values = [value[rows] for value in self.values]
        self.visible = self.visible[rows]


def generate(
    batch: Batch, first: torch.Tensor, position: int, max_new_tokens: int, is_done: Callable[[str], bool]
) -> list[str]:
    """Greedy answers.

    Args:
        first: ``[rows]`` the first answer token of each row.
        position: its logical position.
        is_done: whether an answer may end with this text, because more of it would change nothing.
    """
    model = batch.model
    answers: list[list[int]] = [[] for _ in first]
    alive, tokens = list(range(len(answers))), first.tolist()
    for step in range(max_new_tokens):
        going = []
        for place, (row, token) in enumerate(zip(alive, tokens, strict=True)):
            answers[row].append(token)
            if token not in model.end_ids and not is_done(model.tokenizer.decode(answers[row])):
                going.append(place)
        if not going or step == max_new_tokens - 1:
            break
        if len(going) < len(alive):
            batch.keep(torch.tensor(going, dtype=torch.int64))
            alive = [alive[place] for place in going]
        ids = torch.tensor([[answers[row][-1]] for row in alive], device=model.device)
        tokens = model.logits(batch.extend(ids, position + step)[:, -1]).argmax(-1).tolist()
    return [model.tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
