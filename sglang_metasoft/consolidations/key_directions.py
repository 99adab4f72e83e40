"""A place for a bias in every key: the direction along which all queries of a head have nearly the same component.

Stock attention kernels add nothing to a key's logit. But the queries of a head have a large common part, so that a key
moved by ``b u / scale``, where ``q·u`` is near 1 for all of them, has its logit raised by nearly b whatever is asked.
"""

from typing import NamedTuple

import torch

from sglang_metasoft.consolidations.calibration import CALIBRATION_TOKENS, calibration_ids
from sglang_metasoft.rope import rotate, rotate_all, without_factor
from sglang_metasoft.types import AttentionLayer, LayerKind, ModelShape, Rope, ServedModel, Turning

FIRST_TOKENS = 16  # queries next to the sinks are unlike all later ones
AHEAD_TOKENS = (0, 16, 64, 256, 1024, 2048, 4096)  # how far after the compressed prompt a query may come
RIDGE = 0.01  # of the queries' mean energy in a dimension
SEED = 2605


class KeyDirections(NamedTuple):
    """Of all layers and of this rank's KV heads."""

    unturned: torch.Tensor  # [layers, G, d] float32, for a prompt that ends at position 0
    turns: list[tuple[list[int], Rope]]  # the layers that each rotary embedding turns; with pairs of length one

    def at(self, position: int) -> torch.Tensor:
        """``[layers, G, d]`` for queries at ``position`` and some thousand positions after it."""
        if len(self.turns) == 1 and len(self.turns[0][0]) == len(self.unturned):
            return rotate_all(self.unturned, self.turns[0][1], position)
        directions = list(self.unturned)
        for layers, rope in self.turns:
            for layer, turned in zip(layers, rotate_all(self.unturned[layers], rope, position), strict=True):
                directions[layer] = turned
        return torch.stack(directions)


def fit_key_directions(model: ServedModel, shape: ModelShape, device: torch.device) -> KeyDirections:
    """Least squares of ``q·u = 1`` over the queries of a text, turned to several distances after a prompt's end.

    Only angles between positions count in attention, so what is fitted to a short text serves any length of prompt.
    Queries that no position turns need no turning. Where a position does something else to them, what holds for the
    text need not hold for a prompt: such a layer has no direction, and its keys carry no bias. Nor have layers of a
    window, which keep what they see.

    Args:
        model: without a tokenizer, tokens drawn at random stand for the text: they serve, less well.

    Raises:
        ValueError: no layer can have a direction.
    """
    layers = [layer if layer.kind is LayerKind.FULL else layer._replace(rope=None) for layer in model.layers()]
    full = [layer for layer in layers if layer.kind is LayerKind.FULL]
    if full and all(layer.turning is Turning.OTHER for layer in full):
        raise ValueError(
            "consolidation key_bias: in every layer of this model a position does more to a query than to turn it, so "
            "that no key can carry a bias; allowed: another consolidation"
        )
    ropes = {id(layer.rope): without_factor(layer.rope) for layer in layers if layer.rope is not None}
    longest = min((len(rope.cos_sin) for rope in ropes.values()), default=CALIBRATION_TOKENS)
    ids = torch.tensor(_ids_to_read(model, shape)[:longest], device=device)
    directions = []
    turns: dict[int, list[int]] = {known: [] for known in ropes}
    for number, (layer, queries) in enumerate(zip(layers, model.queries(ids), strict=True)):
        if layer.rope is not None:
            turns[id(layer.rope)].append(number)
        directions.append(_fit(queries.float(), layer, ropes.get(id(layer.rope))))
    return KeyDirections(torch.stack(directions), [(turns[known], rope) for known, rope in ropes.items()])


def _fit(queries: torch.Tensor, layer: AttentionLayer, rope: Rope | None) -> torch.Tensor:
    """``[G, d]`` of one layer; 0 without queries, in a window, and where positions do more than turn them."""
    groups, size = layer.num_kv_heads, layer.head_dim
    moment = torch.zeros(groups, size, size, device=queries.device)
    total = moment[..., 0].clone()
    if layer.turning is Turning.OTHER or layer.kind is LayerKind.WINDOW:
        return total
    center = (queries if rope is None else rotate(queries, rope, 0, backwards=True))[FIRST_TOKENS:]
    for tokens in AHEAD_TOKENS if rope is not None else AHEAD_TOKENS[:1]:
        turned = center if rope is None else rotate_all(center, rope, tokens)
        turned = turned.unflatten(1, (groups, -1)).transpose(0, 1).flatten(1, 2)
        moment += turned.transpose(1, 2) @ turned
        total += turned.sum(1)
    ridge = RIDGE * moment.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(size).to(moment)
    solution, _ = torch.linalg.solve_ex((moment + ridge).cpu(), total.cpu())
    return solution.nan_to_num(0.0, 0.0, 0.0).to(queries.device)


def _ids_to_read(model: ServedModel, shape: ModelShape) -> list[int]:
    try:
        return calibration_ids(model)
    except ValueError:  # a server without a tokenizer
        generator = torch.Generator().manual_seed(SEED)
        return torch.randint(shape.vocab_size, (CALIBRATION_TOKENS,), generator=generator).tolist()
