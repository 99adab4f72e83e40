"""Rows of a model's embedding table, read from its files: what tells a model from another of the same shape."""

from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from sglang_metasoft.types import Embed, ModelShape

TABLE = "embed_tokens.weight"


def embed_from_files(path: str, shape: ModelShape) -> Embed | None:
    """Ids to rows of the embedding table, read one by one from a folder's safetensors files.

    None: there is no folder with such a table of the model's shape.
    """
    for file in sorted(Path(path).glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():
                    if name.endswith(TABLE) and _fits(tensors.get_slice(name).get_shape(), shape):
                        return partial(_rows, file, name)
        except (SafetensorError, OSError, RuntimeError):
            continue
    return None


def _fits(found: list[int], shape: ModelShape) -> bool:
    return len(found) == 2 and found[0] >= shape.vocab_size and found[1] == shape.hidden_size


def _rows(file: Path, name: str, ids: torch.Tensor) -> torch.Tensor:
    with safe_open(file, framework="pt") as tensors:
        table = tensors.get_slice(name)
        return torch.cat([table[row : row + 1] for row in ids.tolist()]).to(ids.device)
