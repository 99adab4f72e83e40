"""Checks of a model, a compressor and server flags, from configurations alone; and the estimate of what fits."""

import argparse
import contextlib
import io
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

from metasoft_patches import compat, families
from metasoft_patches.cpu import DEFAULT_MEMORY_FRACTION, DEFAULT_POOL_TOKENS
from metasoft_patches.doctor.machine_checks import Check
from sglang_metasoft.compressor.find import GIVEN, check_given
from sglang_metasoft.config import MetaSoftConfig
from sglang_metasoft.hf.rows import embed_from_files
from sglang_metasoft.hf.shape import kv_bytes_per_entry, read_config, read_shape
from sglang_metasoft.methods import auto, load_method
from sglang_metasoft.pipeline.estimate import fit_compressed, fit_raw
from sglang_metasoft.pipeline.memory import LIST_BYTES, WORKSPACE_BYTES
from sglang_metasoft.types import ModelShape

GIB = 2**30
GPU_MEMORY_FRACTION = 0.85  # if neither flags nor SGLang say more


class ServerFlagError(ValueError):
    """SGLang's parser refuses a flag."""


class Server(NamedTuple):
    """What the given flags come to."""

    config: MetaSoftConfig
    tp_size: int
    page_size: int
    sliding_window_tokens: int | None
    kv_cache_dtype: str
    memory_fraction: float | None
    max_total_tokens: int | None
    host_pool: tuple[float, float] | None = None  # HiCache's: gigabytes or, where they are 0, slots for each one here


def model(path: str) -> tuple[Check, ModelShape | None]:
    """Whether the folder's configuration can be read."""
    try:
        shape = read_shape(path)
    except ValueError as error:
        return Check("model", "problem", str(error), "give a folder with config.json, or a hub id that is cached"), None
    found = (
        f"{shape.num_layers} layers, {shape.num_heads} query and {shape.num_kv_heads} KV heads of {shape.head_dim}, "
        f"hidden size {shape.hidden_size}"
    )
    return Check("model", "ok", found), shape


def family_in_file(path: str) -> Check | None:
    """What is said of a model's class by its name alone, if it is one that is refused."""
    found = families.refused_in_file(path)
    return None if found is None else _problem(compat.of_class(*found))


def compressor(config: MetaSoftConfig, shape: ModelShape | None) -> Check:
    """Which compressor a server with these settings would serve, and whether it fits the model."""
    if shape is None:
        return Check("compressor", "skipped", "the model must be readable first")
    embed, cpu = embed_from_files(shape.name, shape), torch.device("cpu")
    try:
        found, served = auto.find(config, shape, embed, cpu), auto.without_compressor(config)
        if found is None:
            load_method(served.method).check(served, shape, 1)
        elif found.origin == GIVEN and embed is not None:
            check_given(found, shape, embed, cpu)
    except ValueError as error:
        return Check("compressor", "problem", str(error), "use a compressor trained for this model, or none")
    if found is None and not auto.searches(config):
        return Check("compressor", "skipped", f"method {config.method} needs none")
    if found is None:
        instead = f"method {served.method}, consolidation {served.consolidation or 'its own'}, is served"
        return Check("compressor", "ok", f"none found for this model: {instead}", auto.fit_command(shape))
    unsure = "" if embed is not None else "; embedding rows are compared when the server starts"
    return Check("compressor", "ok", found.description + unsure, auto.beyond_report(config, found))


def server(model_path: str, flags: list[str]) -> tuple[list[Check], Server | None]:
    """Ask SGLang about the flags, and the table of refused features about the result.

    Raises:
        ValueError: a flag is unknown or has a bad value.
    """
    argv = ["--model-path", model_path, *flags]
    if "--enable-metasoft" not in argv:
        argv.append("--enable-metasoft")
    if "--log-level" not in argv:
        argv += ["--log-level", "error"]
    try:
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            args, settings, model_config = _resolve(argv)
    except ServerFlagError:
        raise
    except Exception as error:  # whatever SGLang raises says why it would not start
        return [Check("features", "problem", f"SGLang refuses: {error}", "change the server flags")], None
    refused = compat.refusals(settings, model_config)
    checks = [_problem(refusal) for refusal in refused]
    if all(refusal.setting != compat.MODEL for refusal in refused):
        checks.insert(0, Check("family", "ok", families.verdict_on(model_config)))
    found = Server(
        config=args._metasoft,
        tp_size=settings.tp_size,
        page_size=settings.page_size or 1,
        sliding_window_tokens=families.longest_window(model_config),
        kv_cache_dtype=str(settings.kv_cache_dtype),
        memory_fraction=settings.mem_fraction_static,
        max_total_tokens=settings.max_total_tokens,
        host_pool=(settings.hicache_size, settings.hicache_ratio) if settings.enable_hierarchical_cache else None,
    )
    if not refused:
        checks.append(Check("features", "ok", f"none of {len(compat.REFUSED)} refused features is on"))
    return checks, found


def _problem(refusal: compat.Refusal) -> Check:
    if refusal.setting == compat.MODEL:
        remedy = "another model; which are served: docs/support.md"
        return Check("family", "problem", f"{refusal.feature} is refused: {refusal.why}", remedy)
    found = f"cannot run with {refusal.feature}: {refusal.why}"
    return Check("features", "problem", found, f"without {refusal.setting}")


def _resolve(argv: list[str]):
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.server_args import prepare_server_args

    from metasoft_patches.adapter import load_adapter

    words = io.StringIO()
    try:
        with contextlib.redirect_stderr(words):
            args = prepare_server_args(argv)
    except SystemExit:
        raise ServerFlagError(f"server flags: {words.getvalue().strip().splitlines()[-1]}") from None
    return (args, *load_adapter().settings(args))


def estimate(args: argparse.Namespace, shape: ModelShape, server: Server | None) -> dict:
    """How many of the described requests fit, plainly and at each ratio; see ``docs/doctor.md`` for the fields."""
    server = server or Server(MetaSoftConfig(), 1, 1, None, "auto", None, None)
    rank = shape._replace(num_kv_heads=-(-shape.num_kv_heads // server.tp_size))
    entry_bytes = kv_bytes_per_entry(rank, _kv_dtype(args.model_path, server.kv_cache_dtype))
    pool_tokens, source = _pool(args, server, entry_bytes)
    lengths = dict(pool_tokens=pool_tokens, prompt_tokens=args.prompt_tokens, output_tokens=args.output_tokens)
    fits = [
        fit_compressed(
            server.config,
            ratio,
            **lengths,
            chunk_tokens=args.chunk_tokens,
            page_size=server.page_size,
            sliding_window_tokens=server.sliding_window_tokens,
        )  # fmt: skip
        for ratio in args.ratios
    ]
    return {
        **lengths,
        "pool_source": source,
        "host_pool_tokens": _host_pool_tokens(server.host_pool, pool_tokens, entry_bytes),
        "kv_bytes_per_token": entry_bytes,
        "tp_size": server.tp_size,
        "workspace_bytes": WORKSPACE_BYTES + LIST_BYTES * args.prompt_tokens,
        "requests_raw": fit_raw(**lengths),
        "fits": [fit._asdict() for fit in fits],
    }


def _host_pool_tokens(host_pool: tuple[float, float] | None, pool_tokens: int, entry_bytes: int) -> int:
    if host_pool is None:
        return 0
    gigabytes, ratio = host_pool
    return int(gigabytes * 1e9) // entry_bytes if gigabytes else int(pool_tokens * ratio)


def fit(estimate: dict) -> Check:
    """Whether at least one request fits with compression."""
    best = max(max(fit["requests"], fit["requests_during_prefill"]) for fit in estimate["fits"])
    found = (
        f"{estimate['pool_tokens']:,} tokens hold {estimate['requests_raw']:,} such requests raw, {best:,} compressed"
    )
    if best == 0:
        return Check("pool", "problem", found, "a larger pool, a higher ratio, or --metasoft-during-prefill")
    return Check("pool", "ok", found)


def _kv_dtype(model_path: str, kv_cache_dtype: str) -> torch.dtype:
    if kv_cache_dtype.startswith("fp8"):
        return torch.float8_e4m3fn
    if kv_cache_dtype in ("bf16", "bfloat16"):
        return torch.bfloat16
    return getattr(read_config(model_path), "dtype", None) or torch.bfloat16


def _pool(args: argparse.Namespace, server: Server, entry_bytes: int) -> tuple[int, str]:
    """Tokens of one rank's KV pool, and where the figure comes from."""
    if args.pool_tokens is not None:
        return args.pool_tokens, "as given"
    if args.memory_gib is not None:
        return int(args.memory_gib * GIB) // entry_bytes, f"{args.memory_gib:g} GiB as given"
    weights = sum(file.stat().st_size for file in Path(args.model_path).glob("*.safetensors")) // server.tp_size
    if torch.cuda.is_available():
        total, fraction = torch.cuda.mem_get_info()[1], server.memory_fraction or GPU_MEMORY_FRACTION
        name, limit = torch.cuda.get_device_name(), server.max_total_tokens
    else:
        import psutil

        total, fraction = psutil.virtual_memory().available, server.memory_fraction or DEFAULT_MEMORY_FRACTION
        name, limit = "CPU memory", server.max_total_tokens or DEFAULT_POOL_TOKENS
    tokens = max(0, int(total * fraction) - weights) // entry_bytes
    if limit is not None and limit < tokens:
        return limit, "the server's max-total-tokens"
    return tokens, f"{fraction:g} of {total / GIB:.1f} GiB {name}, less {weights / GIB:.1f} GiB of weights"
