"""Static soft tokens: the file format of ``judge_q``, a variant of the compressor's."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from sglang_metasoft.compressor.files import (
    CONFIG_NAME,
    FORMAT,
    WEIGHTS_NAME,
    check_compressor,
    check_embedding,
    check_rows,
    read_weights,
    resolve_folder,
)
from sglang_metasoft.types import Embed, ModelShape

METHOD = "judge_q"


def _nothing_to_check() -> None:
    """For tokens that no file was read for: there is no embedding table that they belong to."""


@dataclasses.dataclass(frozen=True)
class StaticTokens:
    """The same soft tokens for every prompt."""

    tokens: torch.Tensor  # [k, D] float32
    check_again: Callable[[], None] = _nothing_to_check  # raises ValueError if the model's embeddings are others now

    @property
    def count(self) -> int:
        """k."""
        return self.tokens.shape[0]

    @property
    def fingerprint(self) -> str:
        """Digest of the tokens."""
        return hashlib.sha256(self.tokens.float().cpu().contiguous().numpy().tobytes()).hexdigest()[:16]

    def save(self, folder: Path, shape: ModelShape, embed: Embed) -> None:
        """Write ``config.json`` and ``model.safetensors``: ``static_tokens`` and ``embedding_check``.

        Args:
            embed: of the model that they were trained for; some of its rows let the server recognize it.
        """
        folder.mkdir(parents=True, exist_ok=True)
        sizes = dict(
            hidden_size=shape.hidden_size,
            count=self.count,
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
        )
        config = {"format": FORMAT, "method": METHOD, "model": shape._asdict(), "sizes": sizes}
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
        tensors = {
            "static_tokens": self.tokens.float().cpu().contiguous(),
            "embedding_check": check_rows(shape, embed, self.tokens.device),
        }
        save_file(tensors, folder / WEIGHTS_NAME)

    @classmethod
    def load(cls, path: str, shape: ModelShape, embed: Embed, device: torch.device) -> "StaticTokens":
        """Load static soft tokens for the served model.

        Args:
            path: directory or hub id with ``config.json`` and ``model.safetensors``.

        Raises:
            ValueError: files missing or damaged, or made for another model or method.
        """
        folder = resolve_folder(path)
        config = check_compressor(path, shape, folder, method=METHOD)
        try:
            weights = read_weights(folder / WEIGHTS_NAME)
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            raise ValueError(f"metasoft path: {path!r}: {WEIGHTS_NAME} cannot be read: {error}") from None
        check_again = partial(check_embedding, path, config, weights["embedding_check"], shape, embed, device)
        check_again()
        return cls(weights["static_tokens"].to(device), check_again)
