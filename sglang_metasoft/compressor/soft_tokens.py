"""Soft tokens from an orthogonal meta-library (Meta-Soft, arXiv 2605.22337; docs/methods.md).

The library holds M orthonormal rows. A small selector reads features of the prompt, taken from the embedding
table alone, and composes each soft token from a few rows. At inference nothing is sampled: the same prompt gives
the same soft tokens, on every rank.
"""

import hashlib
import json
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from sglang_metasoft.compressor.entry_scorer import MODES, EntryScorer
from sglang_metasoft.compressor.files import (
    CHECK_ROWS,
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

LIBRARY_ROWS = 512
TAIL_TOKENS = 64  # last tokens of a prompt whose mean embedding the selector reads
EMBED_BLOCK_TOKENS = 4096
SEED = 2605


class SoftTokens(nn.Module):
    """Meta-library and selector.

    Args:
        hidden_size: D of the model.
        rows: M, library rows, at most D.
        count: k, soft tokens.
        num_layers, num_kv_heads: of the whole model, for the gate's scale.
        trunk: width of the selector's hidden layer.
        query: width in which soft tokens and library rows are matched.
        top: library rows that one soft token is composed of.
        scorer: width of the entry scorer, 0 for none.
        head_dim: d of the model, for the entry scorer.
    """

    def __init__(
        self,
        hidden_size: int,
        rows: int,
        count: int,
        num_layers: int,
        num_kv_heads: int,
        trunk: int = 256,
        query: int = 32,
        top: int = 8,
        scorer: int = 0,
        head_dim: int = 1,
    ) -> None:
        super().__init__()
        self.count, self.query, self.top = count, query, min(top, rows)
        self.sizes = dict(
            hidden_size=hidden_size,
            rows=rows,
            count=count,
            num_layers=num_layers,
            num_kv_heads=num_kv_heads,
            trunk=trunk,
            query=query,
            top=top,
            scorer=scorer,
            head_dim=head_dim,
        )
        self.library = nn.Parameter(torch.empty(rows, hidden_size))
        self.trunk = nn.Linear(2 * hidden_size, trunk)
        self.to_query = nn.Linear(trunk, count * query)
        self.row_keys = nn.Parameter(torch.empty(rows, query))
        self.bias = nn.Parameter(torch.empty(MODES, count, rows))
        self.norm = nn.Parameter(torch.ones(()))
        self.gate_scale = nn.Parameter(torch.ones(num_layers, num_kv_heads))
        self.scorer = EntryScorer(num_layers, num_kv_heads, head_dim, scorer) if scorer else None
        # A few rows of the model's embedding table, to recognize the model again.
        self.register_buffer("embedding_check", torch.zeros(CHECK_ROWS, hidden_size))

    def features(self, embed: Embed, span_ids: torch.Tensor, tail_ids: torch.Tensor) -> torch.Tensor:
        """``[2 D]`` float32: mean embedding of the span and of the prompt's last tokens, each scaled to unit RMS."""
        total = sum(embed(block).float().sum(0) for block in span_ids.split(EMBED_BLOCK_TOKENS))
        means = torch.stack([total / span_ids.numel(), embed(tail_ids).float().mean(0)])
        return nn.functional.rms_norm(means, means.shape[-1:]).flatten()

    def selection_logits(self, features: torch.Tensor, mode: int = 0) -> torch.Tensor:
        """``[k, M]`` logits over the library rows from ``[2 D]`` features; mode 1 is a span that ends at a boundary."""
        queries = self.to_query(nn.functional.silu(self.trunk(features))).view(self.count, self.query)
        return queries @ self.row_keys.t() + self.bias[mode]

    def compose(self, logits: torch.Tensor) -> torch.Tensor:
        """``[k, D]`` soft tokens: softmax over the best ``top`` rows of each, times the learned norm."""
        best = logits.topk(self.top, dim=-1)
        weights = torch.zeros_like(logits).scatter(-1, best.indices, best.values.softmax(-1))
        return self.norm * (weights @ self.library)

    @torch.no_grad()
    def forward(self, embed: Embed, span_ids: torch.Tensor, tail_ids: torch.Tensor, mode: int = 0) -> torch.Tensor:
        """``[k, D]`` float32 soft tokens for a prompt.

        Args:
            embed: of the model.
            span_ids: ``[S]`` int64.
            tail_ids: the prompt's last ``TAIL_TOKENS``, however many of them are in the span.
            mode: 1 for a span that ends at a boundary.
        """
        return self.compose(self.selection_logits(self.features(embed, span_ids, tail_ids), mode))

    @property
    def fingerprint(self) -> str:
        """Digest of all weights: two compressors that could differ in a result have different ones."""
        return self._fingerprint

    def freeze(self, device: torch.device) -> "SoftTokens":
        """Fix the weights for inference and compute the fingerprint."""
        digest = hashlib.sha256(json.dumps(self.sizes, sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.float().cpu().contiguous().numpy().tobytes())
        self._fingerprint = digest.hexdigest()[:16]
        return self.requires_grad_(False).eval().to(device)

    @classmethod
    def untrained(cls, shape: ModelShape, count: int, embed: Embed, device: torch.device) -> "SoftTokens":
        """Deterministic soft tokens for any model: orthonormal rows from its own embedding table, fixed selector."""
        generator = torch.Generator().manual_seed(SEED)
        rows = min(LIBRARY_ROWS, shape.hidden_size)
        ids = torch.randperm(shape.vocab_size, generator=generator)[:rows]
        table = embed(ids.to(device)).double().cpu()
        module = cls(shape.hidden_size, rows, count, shape.num_layers, shape.num_kv_heads)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if name not in ("norm", "gate_scale"):
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            module.bias.mul_(10)
            q, r = torch.linalg.qr(table.t())
            module.library.copy_((q * r.diagonal().sign()).t())
            module.norm.fill_(table.norm(dim=-1).mean())
            module.embedding_check.copy_(check_rows(shape, embed, device))
        return module.freeze(device)

    def save(self, folder: Path, shape: ModelShape) -> None:
        """Write ``config.json`` and ``model.safetensors`` into ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        config = {"format": FORMAT, "model": shape._asdict(), "sizes": self.sizes}
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
        save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, folder / WEIGHTS_NAME)

    @classmethod
    def load(cls, path: str, shape: ModelShape, embed: Embed, device: torch.device) -> "SoftTokens":
        """Load a trained compressor for the served model.

        Args:
            path: directory or hub id with ``config.json`` and ``model.safetensors``.

        Raises:
            ValueError: files missing or damaged, or trained for another model; both models are named.
        """
        folder = resolve_folder(path)
        config = check_compressor(path, shape, folder)
        with torch.device("meta"):  # sizes cost no memory until the weights are known to have them
            module = cls(**config["sizes"])
        try:
            module.load_state_dict(read_weights(folder / WEIGHTS_NAME), assign=True)
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            raise ValueError(f"metasoft path: {path!r}: {WEIGHTS_NAME} cannot be read: {error}") from None
        module.check_again = partial(check_embedding, path, config, module.embedding_check, shape, embed, device)
        module.check_again()
        return module.freeze(device)
