"""A place for a bias in every key: the direction along which all queries of a head have nearly the same component.

Stock attention kernels add nothing to a key's logit. But the queries of a head have a large common part, so that a key
moved by ``b u / scale``, where ``q·u`` is near 1 for all of them, has its logit raised by nearly b whatever is asked.
"""

from typing import NamedTuple

import torch

from sglang_metasoft.consolidations.calibration import CALIBRATION_TOKENS, calibration_ids
from sglang_metasoft.rope import rotate, rotate_all, without_factor
from sglang_metasoft.types import ModelShape, Rope, ServedModel

FIRST_TOKENS = 16  # queries next to the sinks are unlike all later ones
AHEAD_TOKENS = (0, 16, 64, 256, 1024, 2048, 4096)  # how far after the compressed prompt a query may come
RIDGE = 0.01  # of the queries' mean energy in a dimension
SEED = 2605


class KeyDirections(NamedTuple):
    """Of all layers and of this rank's KV heads."""

    unturned: torch.Tensor  # [layers, G, d] float32, for a prompt that ends at position 0
    rope: Rope  # with pairs of length one

    def at(self, position: int) -> torch.Tensor:
        """``[layers, G, d]`` for queries at ``position`` and some thousand positions after it."""
        return rotate_all(self.unturned, self.rope, position)


def fit_key_directions(model: ServedModel, shape: ModelShape, device: torch.device) -> KeyDirections:
    """Least squares of ``q·u = 1`` over the queries of a text, turned to several distances after a prompt's end.

    Only angles between positions count in attention, so what is fitted to a short text serves any length of prompt.

    Args:
        model: without a tokenizer, tokens drawn at random stand for the text: they serve, less well.

    Raises:
        ValueError: the model has no rotary embedding, or several.
    """
    rope = without_factor(model.rope())
    ids = torch.tensor(_ids_to_read(model, shape)[: len(rope.cos_sin)], device=device)
    directions = []
    for queries in model.queries(ids):
        groups = max(1, queries.shape[1] * shape.num_kv_heads // shape.num_heads)
        center = rotate(queries.float(), rope, 0, backwards=True)[FIRST_TOKENS:]
        moment = torch.zeros(groups, shape.head_dim, shape.head_dim, device=device)
        total = moment[..., 0].clone()
        for tokens in AHEAD_TOKENS:
            turned = rotate_all(center, rope, tokens).unflatten(1, (groups, -1)).transpose(0, 1).flatten(1, 2)
            moment += turned.transpose(1, 2) @ turned
            total += turned.sum(1)
        ridge = RIDGE * moment.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(shape.head_dim).to(moment)
        solution, _ = torch.linalg.solve_ex((moment + ridge).cpu(), total.cpu())
        directions.append(solution.nan_to_num(0.0, 0.0, 0.0).to(device))  # a head without queries carries no bias
    return KeyDirections(torch.stack(directions), rope)


def _ids_to_read(model: ServedModel, shape: ModelShape) -> list[int]:
    try:
        return calibration_ids(model)
    except ValueError:  # a server without a tokenizer
        generator = torch.Generator().manual_seed(SEED)
        return torch.randint(shape.vocab_size, (CALIBRATION_TOKENS,), generator=generator).tolist()
