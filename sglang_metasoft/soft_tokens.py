"""Soft tokens from an orthogonal meta-library (Meta-Soft, arXiv 2605.22337; docs/methods.md).

The library holds M orthonormal rows. A small selector reads features of the prompt, taken from the embedding
table alone, and composes each soft token from a few rows. At inference nothing is sampled: the same prompt gives
the same soft tokens, on every rank.
"""

import contextlib
import hashlib
import inspect
import json
import os
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from sglang_metasoft.config import shown
from sglang_metasoft.entry_scorer import MODES, EntryScorer
from sglang_metasoft.types import Embed, ModelShape

FORMAT = "metasoft-compressor-2"
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
LIBRARY_ROWS = 512
MAX_SIZE = 65536
MAX_HEADER_BYTES = 2**20  # of model.safetensors
BUILT_IN = Path(__file__).parent / "compressors"
TAIL_TOKENS = 64  # last tokens of a prompt whose mean embedding the selector reads
CHECK_ROWS = 32
CHECK_COSINE = 0.99
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
        # A few rows of the model's embedding table, to recognise the model again.
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

    def seal(self, device: torch.device) -> "SoftTokens":
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
        return module.seal(device)

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
        return module.seal(device)


def read_weights(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of ``file``, whose header was checked, as float32 copies.

    Raises:
        ValueError: a tensor is not finite.
    """
    weights = {}
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():
            weights[name] = tensors.get_tensor(name).to(torch.float32, copy=True)
            if not weights[name].isfinite().all():
                raise ValueError(f"{name} has values that are not finite")
    return weights


def read_header(file: Path) -> dict[str, dict]:
    """The header of a safetensors file: tensor names, each with its ``dtype`` and ``shape``. Nothing else is read.

    Raises:
        ValueError: there is none.
    """
    with file.open("rb") as data:
        size = int.from_bytes(data.read(8), "little")
        if not 2 <= size <= MAX_HEADER_BYTES:
            raise ValueError(f"its header has {size} bytes; allowed: 2 to {MAX_HEADER_BYTES}")
        try:
            header = json.loads(data.read(size))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"its header is not JSON ({error})") from None
    if not isinstance(header, dict) or not all(isinstance(entry, dict) for entry in header.values()):
        raise ValueError(f"its header is {shown(header)}; allowed: an object of objects")
    return {name: entry for name, entry in header.items() if name != "__metadata__"}


def check_header(header: dict[str, dict], shapes: dict[str, tuple[int, ...]]) -> None:
    """Compare names, shapes and types of a file's tensors with what they should be.

    Raises:
        ValueError: they differ, or there are others.
    """
    if missing := shapes.keys() - header.keys():
        raise ValueError(f"lacks {', '.join(sorted(missing))}")
    if others := header.keys() - shapes.keys():
        raise ValueError(f"has {shown(min(others))}, which belongs to no compressor; allowed: {', '.join(shapes)}")
    for name, shape in shapes.items():
        dtype, found = header[name].get("dtype"), header[name].get("shape")
        if not str(dtype).startswith(("F", "BF")):
            raise ValueError(f"{name} has dtype {shown(dtype)}; allowed: floating point")
        if found != list(shape):
            raise ValueError(f"{name} has shape {shown(found)}; allowed: {list(shape)}")


def tensor_shapes(method: str, sizes: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """The tensors of a compressor with these sizes, by name."""
    if method == "judge_q":
        width = sizes["hidden_size"]
        return {"static_tokens": (sizes["count"], width), "embedding_check": (CHECK_ROWS, width)}
    with torch.device("meta"):  # sizes cost no memory until the weights are known to have them
        return {name: tuple(tensor.shape) for name, tensor in SoftTokens(**sizes).state_dict().items()}


def check_rows(shape: ModelShape, embed: Embed, device: torch.device) -> torch.Tensor:
    """``[CHECK_ROWS, D]`` float32 on the CPU: evenly spaced rows of the embedding table."""
    ids = torch.arange(CHECK_ROWS) * (shape.vocab_size // CHECK_ROWS)
    return embed(ids.to(device)).float().cpu()


def check_embedding(
    path: str, config: dict, rows: torch.Tensor, shape: ModelShape, embed: Embed, device: torch.device
) -> None:
    """Raise ValueError unless ``rows``, ``[CHECK_ROWS, D]``, are those of the served model's embedding table."""
    cosine = nn.functional.cosine_similarity(check_rows(shape, embed, device), rows.float(), dim=-1).min().item()
    if not cosine >= CHECK_COSINE:
        raise ValueError(
            f"metasoft path: {path!r} was trained for {shown(config['model']['name'])}, whose embedding table is "
            f"not that of the served model {shape.name!r} (smallest cosine of compared rows {cosine:.3f})"
        )


def resolve_folder(path: str) -> Path:
    """The directory of a compressor: the path itself, one that the package ships, or a hub id, downloaded.

    Of the hub, the two known files only; a branch, tag or commit may follow the id, as ``name@revision``.

    Raises:
        ValueError: none of them; the shipped ones are named.
    """
    if os.path.isdir(path):  # unlike Path.is_dir, also answers for a name that no file system could hold
        return Path(path)
    built_in = sorted(folder.name for folder in BUILT_IN.iterdir() if folder.is_dir()) if BUILT_IN.is_dir() else []
    if path in built_in:
        return BUILT_IN / path
    from huggingface_hub import snapshot_download

    name, at, revision = path.partition("@")
    try:
        if at and not revision:
            raise ValueError("nothing follows the @")
        wanted = {"revision": revision or None, "allow_patterns": [CONFIG_NAME, WEIGHTS_NAME]}
        try:
            return Path(snapshot_download(name, **wanted))
        except OSError:  # without a network, what was downloaded once will do
            with contextlib.suppress(OSError):
                return Path(snapshot_download(name, **wanted, local_files_only=True))
            raise
    except Exception as error:
        raise ValueError(
            f"metasoft path: {path!r} is no directory, not shipped ({', '.join(built_in) or 'none is'}), "
            f"and could not be downloaded as a hub id (name or name@revision): {' '.join(str(error).split())}"
        ) from None


def check_compressor(path: str, shape: ModelShape, folder: Path | None = None, method: str = "metasoft") -> dict:
    """Check a compressor's configuration, and the header of its weights, against the served model; reads no weights.

    Args:
        method: what it has to be trained for; a configuration that names none is of ``metasoft``.

    Raises:
        ValueError: missing or damaged files, or a compressor for another method, model, size or head layout.
    """
    folder = folder or resolve_folder(path)
    missing = [name for name in (CONFIG_NAME, WEIGHTS_NAME) if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"metasoft path: {path!r} lacks {' and '.join(missing)}")
    try:
        header = read_header(folder / WEIGHTS_NAME)
    except (OSError, ValueError) as error:
        raise ValueError(f"metasoft path: {path!r}: {WEIGHTS_NAME} cannot be read: {error}") from None
    try:
        config = json.loads((folder / CONFIG_NAME).read_text())
        found_format, trained_for, sizes = config["format"], config["model"], config["sizes"]
        trained_name = shown(trained_for["name"])
        expected = dict(hidden_size=shape.hidden_size, num_layers=shape.num_layers, num_kv_heads=shape.num_kv_heads)
        expected |= {"head_dim": shape.head_dim} if sizes.get("scorer") else {}
        wrong = {
            field: (trained_for[field], value)
            for field, value in shape._asdict().items()
            if field != "name" and trained_for[field] != value
        }
        wrong |= {field: (sizes[field], value) for field, value in expected.items() if sizes[field] != value}
        found_method = config.get("method", "metasoft")
        if found_method == method:
            _check_sizes(sizes, SIZES[method])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"metasoft path: {path!r}: {CONFIG_NAME} is no compressor configuration: {error!r}") from None
    if found_format != FORMAT:
        raise ValueError(f"metasoft path: {path!r} has format {shown(found_format)}; allowed: {FORMAT!r}")
    if found_method != method:
        raise ValueError(
            f"metasoft path: {path!r} is trained for method {shown(found_method)}; the server's is {method!r}"
        )
    if wrong:
        details = ", ".join(f"{field} {shown(a)} there, {b} here" for field, (a, b) in wrong.items())
        raise ValueError(
            f"metasoft path: {path!r} was trained for {trained_name} and does not fit the served model "
            f"{shape.name!r}: {details}"
        )
    try:
        check_header(header, tensor_shapes(method, sizes))
        with safe_open(folder / WEIGHTS_NAME, framework="pt"):
            pass  # compares what the header promises with the file's length
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"metasoft path: {path!r}: {WEIGHTS_NAME} cannot be read: {error}") from None
    return config


SIZES = {
    "metasoft": list(inspect.signature(SoftTokens).parameters),
    "judge_q": ["hidden_size", "count", "num_layers", "num_kv_heads"],
}


def _check_sizes(sizes: dict, names: list[str]) -> None:
    """Raise ValueError unless ``sizes`` has these names, and sound values."""
    if sorted(sizes) != sorted(names):
        raise ValueError(f"sizes has the keys {shown(sorted(sizes))}; allowed: {names}")
    for name, value in sizes.items():
        least = 0 if name == "scorer" else 1
        if type(value) is not int or not least <= value <= MAX_SIZE:
            raise ValueError(f"sizes has {name}={shown(value)}; allowed: an integer from {least} to {MAX_SIZE}")
