"""The files of a compressor: where they are, what they hold, and whether they fit the served model.

``config.json`` has ``format``, ``method``, ``model`` and ``sizes``, and may have the ``report`` that
:mod:`sglang_metasoft.compressor.report` reads; ``model.safetensors`` has the tensors that :func:`tensor_shapes` lists.
"""

import contextlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from sglang_metasoft.compressor.entry_scorer import EXTRA_FEATURES, MODES
from sglang_metasoft.config import shown
from sglang_metasoft.types import Embed, ModelShape

FORMAT = "metasoft-compressor-2"
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
SHIPPED = Path(__file__).parent / "shipped"
MAX_SIZE = 65536
MAX_HEADER_BYTES = 2**20  # of model.safetensors
CHECK_ROWS = 32
CHECK_COSINE = 0.99
# What ``sizes`` has, by method.
SIZES = {
    "metasoft": (
        "hidden_size", "rows", "count", "num_layers", "num_kv_heads", "trunk", "query", "top", "scorer", "head_dim",
    ),
    "judge_q": ("hidden_size", "count", "num_layers", "num_kv_heads"),
}  # fmt: skip


class OtherModel(ValueError):
    """A compressor is whole, but of another model or method."""


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
    """The tensors of a compressor with these sizes, by name: the format, as data."""
    width, count = sizes["hidden_size"], sizes["count"]
    check: dict[str, tuple[int, ...]] = {"embedding_check": (CHECK_ROWS, width)}
    if method == "judge_q":
        return {"static_tokens": (count, width)} | check
    rows, trunk, query, scorer = (sizes[name] for name in ("rows", "trunk", "query", "scorer"))
    heads = (sizes["num_layers"], sizes["num_kv_heads"])
    shapes: dict[str, tuple[int, ...]] = {
        "library": (rows, width),
        "row_keys": (rows, query),
        "bias": (MODES, count, rows),
        "norm": (),
        "gate_scale": heads,
        "trunk.weight": (trunk, 2 * width),
        "trunk.bias": (trunk,),
        "to_query.weight": (count * query, trunk),
        "to_query.bias": (count * query,),
    }
    if scorer:
        features = sizes["head_dim"] + sizes["head_dim"] // 2 + EXTRA_FEATURES
        shapes |= {
            "scorer.hidden": (MODES, *heads, features, scorer),
            "scorer.hidden_bias": (MODES, *heads, scorer),
            "scorer.out": (MODES, *heads, scorer),
            "scorer.trust": (MODES, *heads),
            "scorer.neighbours": (MODES, *heads),
        }
    return shapes | check


def check_rows(shape: ModelShape, embed: Embed, device: torch.device) -> torch.Tensor:
    """``[CHECK_ROWS, D]`` float32 on the CPU: evenly spaced rows of the embedding table."""
    ids = torch.arange(CHECK_ROWS) * (shape.vocab_size // CHECK_ROWS)
    return embed(ids.to(device)).float().cpu()


def smallest_cosine(rows: torch.Tensor, others: torch.Tensor) -> float:
    """Of all pairs of rows, ``[CHECK_ROWS, D]`` each; at least ``CHECK_COSINE`` if they are of the same model."""
    cosines = nn.functional.cosine_similarity(rows, others.float(), dim=-1)
    are_zero = ~(rows.any(-1) | others.any(-1))  # of padding
    return cosines.masked_fill(are_zero, 1.0).min().item()


def check_embedding(
    path: str, config: dict, rows: torch.Tensor, shape: ModelShape, embed: Embed, device: torch.device
) -> None:
    """Raise OtherModel unless ``rows``, ``[CHECK_ROWS, D]``, are those of the served model's embedding table."""
    cosine = smallest_cosine(check_rows(shape, embed, device), rows)
    if not cosine >= CHECK_COSINE:
        raise OtherModel(
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
    shipped = sorted(folder.name for folder in SHIPPED.iterdir() if folder.is_dir()) if SHIPPED.is_dir() else []
    if path in shipped:
        return SHIPPED / path
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
            f"metasoft path: {path!r} is no directory, not shipped ({', '.join(shipped) or 'none is'}), "
            f"and could not be downloaded as a hub id (name or name@revision): {' '.join(str(error).split())}"
        ) from None


def method_of(config: dict) -> str:
    """What a compressor was trained for; a configuration that names nothing is of ``metasoft``."""
    return config.get("method", "metasoft")


def check_compressor(path: str, shape: ModelShape, folder: Path | None = None, method: str | None = "metasoft") -> dict:
    """Check a compressor's configuration, and the header of its weights, against the served model; reads no weights.

    Args:
        method: what it has to be trained for; None: any method.

    Raises:
        ValueError: missing or damaged files.
        OtherModel: a compressor for another method, model, size or head layout.
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
        found_method = method_of(config)
        if found_method == method or (method is None and found_method in SIZES):
            _check_sizes(sizes, SIZES[found_method])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"metasoft path: {path!r}: {CONFIG_NAME} is no compressor configuration: {error!r}") from None
    if found_format != FORMAT:
        raise ValueError(f"metasoft path: {path!r} has format {shown(found_format)}; allowed: {FORMAT!r}")
    if found_method not in (SIZES if method is None else (method,)):
        allowed = f"allowed: {', '.join(SIZES)}" if method is None else f"the server's is {method!r}"
        raise OtherModel(f"metasoft path: {path!r} is trained for method {shown(found_method)}; {allowed}")
    if wrong:
        details = ", ".join(f"{field} {shown(a)} there, {b} here" for field, (a, b) in wrong.items())
        raise OtherModel(
            f"metasoft path: {path!r} was trained for {trained_name} and does not fit the served model "
            f"{shape.name!r}: {details}"
        )
    try:
        check_header(header, tensor_shapes(found_method, sizes))
        with safe_open(folder / WEIGHTS_NAME, framework="pt"):
            pass  # compares what the header promises with the file's length
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"metasoft path: {path!r}: {WEIGHTS_NAME} cannot be read: {error}") from None
    return config


def _check_sizes(sizes: dict, names: tuple[str, ...]) -> None:
    """Raise ValueError unless ``sizes`` has these names, and sound values."""
    if sorted(sizes) != sorted(names):
        raise ValueError(f"sizes has the keys {shown(sorted(sizes))}; allowed: {list(names)}")
    for name, value in sizes.items():
        least = 0 if name == "scorer" else 1
        if type(value) is not int or not least <= value <= MAX_SIZE:
            raise ValueError(f"sizes has {name}={shown(value)}; allowed: an integer from {least} to {MAX_SIZE}")
