"""Caches that are continued: several of one model and of different lengths as one batch, and greedy answers."""

from collections.abc import Callable

import torch
from torch.nn.functional import scaled_dot_product_attention

from sglang_metasoft.hf.model import HFModel, LayerKV, visible_in_window


class Batch:
    """Caches of different lengths that are continued together.

    Args:
        rows: for each row its entries in all layers; they are copied.
        room: tokens that may be added.
    """

    def __init__(self, model: HFModel, rows: list[list[LayerKV]], room: int) -> None:
        self.model = model
        lengths = [row[0].key.shape[0] for row in rows]
        self.used = max(lengths)
        size = len(rows), model.shape.num_kv_heads, self.used + room, model.shape.head_dim
        self.keys, self.values = (
            [torch.zeros(size, dtype=model.dtype, device=model.device) for _ in rows[0]] for _ in range(2)
        )
        for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            for layer, kv in enumerate(row):
                self.keys[layer][number, :, self.used - length : self.used] = kv.key.transpose(0, 1)
                self.values[layer][number, :, self.used - length : self.used] = kv.value.transpose(0, 1)
        place = torch.arange(self.used + room, device=model.device)
        self.visible = place >= self.used - torch.tensor(lengths, device=model.device)[:, None]

    @torch.no_grad()
    def extend(self, ids: torch.Tensor, position: int | torch.Tensor, last: int = 0) -> torch.Tensor:
        """Add ``[rows, n]`` tokens; float32 logits ``[rows, last, vocabulary]``, 0: of all.

        Args:
            position: logical, of the first: one number, or ``[rows]``.
        """
        rows, count = ids.shape
        start, self.used = self.used, self.used + count
        place = torch.arange(self.used, device=ids.device)
        causal = place <= start + torch.arange(count, device=ids.device)[:, None]
        mask = self.visible[:, None, : self.used] & causal
        windows: dict[int | None, torch.Tensor] = {
            window: mask & visible_in_window(count, self.used, window, ids.device)
            for window in set(self.model.windows)
            if window is not None
        }

        def attend(layer, q, k, v, scale):
            seen = windows.get(self.model.windows[layer], mask)
            keys, values = self.keys[layer], self.values[layer]
            keys[:, :, start : self.used], values[:, :, start : self.used] = k, v
            groups = k.shape[1]
            per_group = q.shape[1] // groups
            q = q.reshape(rows, groups, per_group * count, -1)
            out = scaled_dot_product_attention(
                q, keys[:, :, : self.used], values[:, :, : self.used],
                attn_mask=seen[:, None].expand(-1, 1, -1, -1).repeat(1, 1, per_group, 1), scale=scale,
            )  # fmt: skip
            return out.reshape(rows, groups * per_group, count, -1)

        first = torch.as_tensor(position, device=ids.device).reshape(-1, 1)
        positions = (first + torch.arange(count, device=ids.device)).expand(rows, -1)
        return self.model.logits(self.model.embed(ids), positions, attend, last)

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows only."""
        self.keys = [key[rows] for key in self.keys]
        self.values = [value[rows] for value in self.values]
        self.visible = self.visible[rows]


def generate(
    batch: Batch,
    first: list[int],
    position: int | torch.Tensor,
    max_new_tokens: int,
    is_done: Callable[[str], bool] | None = None,
) -> list[list[int]]:
    """Greedy answers, end tokens included.

    Args:
        first: the first answer token of each row.
        position: its logical position: one number, or ``[rows]``.
        is_done: whether an answer may end with this text, because more of it would change nothing.
    """
    model = batch.model
    answers: list[list[int]] = [[] for _ in first]
    alive, tokens = list(range(len(answers))), first
    positions = torch.as_tensor(position, device=model.device).expand(len(answers))
    for step in range(max_new_tokens):
        going = []
        for place, (row, token) in enumerate(zip(alive, tokens, strict=True)):
            answers[row].append(token)
            if token not in model.end_ids and not (is_done and is_done(model.tokenizer.decode(answers[row]))):
                going.append(place)
        if not going or step == max_new_tokens - 1:
            break
        if len(going) < len(alive):
            batch.keep(torch.tensor(going, dtype=torch.int64))
            alive = [alive[place] for place in going]
        ids = model.tensor([[answers[row][-1]] for row in alive])
        tokens = batch.extend(ids, positions[alive] + step, last=1)[:, -1].argmax(-1).tolist()
    return answers


def joined(merged, raw: LayerKV, start: int, end: int | None = None) -> LayerKV:
    """A layer's consolidated entries, and the raw ones of the prompt's tokens from ``start`` to ``end`` after them."""
    return LayerKV(torch.cat([merged.key, raw.key[start:end]]), torch.cat([merged.value, raw.value[start:end]]))
