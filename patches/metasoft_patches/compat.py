"""What MetaSoft works with: the supported SGLang versions and the refused features, as data.

The start-up check and the table in docs/support.md are both made from :data:`REFUSED`.
"""

import os
import platform
import re
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, NamedTuple

import torch

from metasoft_patches import families
from metasoft_patches.window_backends import unkept_windows

MODEL = "--model-path"
# The first is the one that a plain installation brings.
SUPPORTED_SGLANG = ("0.5.23", "0.5.17")


class Refusal(NamedTuple):
    """A feature that cannot run together with compression (yet)."""

    feature: str
    setting: str  # what the user set, for the message
    is_on: Callable[[Any, Any], bool]  # resolved server arguments, model configuration
    why: str

    @property
    def error(self) -> ValueError:
        """One sentence with the feature, the setting and the reason."""
        return ValueError(f"--enable-metasoft cannot run with {self.feature} ({self.setting}): {self.why}")


def _backends(args: Any) -> set[str]:
    names = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")
    return {getattr(args, name) for name in names}


def _has_recurrent_layers(model: Any) -> bool:
    from sglang.srt.configs.hybrid_arch import mambaish_config

    return mambaish_config(model) is not None


# Also refused while the server runs.
STORAGE = Refusal(
    "HiCache storage",
    "--hicache-storage-backend",
    lambda args, model: args.hicache_storage_backend is not None,
    "compressed prefixes are kept under ids that no other start of a server, and no other server, can know",
)

REFUSED = (
    Refusal(
        "speculative decoding",
        "--speculative-algorithm",
        lambda args, model: args.speculative_algorithm is not None,
        "draft and target would disagree about positions",
    ),
    Refusal(
        "prefill/decode disaggregation",
        "--disaggregation-mode",
        lambda args, model: args.disaggregation_mode != "null",
        "the transfer protocol sends raw prompts",
    ),
    Refusal(
        "pipeline parallelism",
        "--pp-size",
        lambda args, model: args.pp_size > 1,
        "the probe needs all layers in one process",
    ),
    Refusal(
        "attention data parallelism",
        "--enable-dp-attention",
        lambda args, model: args.enable_dp_attention or (args.attn_dp_size or 1) > 1,
        "the probe would have to run in step on all ranks",
    ),
    Refusal(
        "context parallelism",
        "--attn-cp-size, --dcp-size",
        lambda args, model: (args.attn_cp_size or 1) > 1 or (args.dcp_size or 1) > 1,
        "a prompt's entries are spread over ranks",
    ),
    Refusal(
        "KV-cache sharding",
        "--enable-kv-cache-sharding",
        lambda args, model: args.enable_kv_cache_sharding,
        "a prompt's entries are spread over ranks",
    ),
    Refusal(
        "two-batch overlap",
        "--enable-two-batch-overlap",
        lambda args, model: args.enable_two_batch_overlap,
        "positions are split before the offset is added",
    ),
    Refusal("PD multiplexing", "--enable-pdmux", lambda args, model: args.enable_pdmux, "it has its own event loop"),
    Refusal(
        "HiCache on SGLang 0.5.17",
        "--enable-hierarchical-cache",
        lambda args, model: args.enable_hierarchical_cache and tested_version(version("sglang")) == "0.5.17",
        "a request whose load-back is declined cannot stay in the queue there, and virtual tokens cannot be computed",
    ),
    STORAGE,
    Refusal("LMCache", "--enable-lmcache", lambda args, model: args.enable_lmcache, "it replaces the radix cache"),
    Refusal("FlexKV", "--enable-flexkv", lambda args, model: args.enable_flexkv, "it replaces the radix cache"),
    Refusal(
        "external cache linker",
        "--enable-unified-cache-external-linker",
        lambda args, model: args.enable_unified_cache_external_linker,
        "it stores KV under raw token ids",
    ),
    Refusal(
        "KV events",
        "--kv-events-config",
        lambda args, model: bool(args.kv_events_config),
        "routers would be told of virtual ids, which no prompt matches, and of raw blocks that go",
    ),
    Refusal("HiSparse", "--enable-hisparse", lambda args, model: args.enable_hisparse, "it manages the pool itself"),
    Refusal(
        "another radix cache",
        "--radix-cache-backend",
        lambda args, model: args.radix_cache_backend not in (None, "metasoft"),
        "MetaSoft brings its own",
    ),
    Refusal(
        "no radix cache",
        "--disable-radix-cache",
        lambda args, model: args.disable_radix_cache,
        "compressed prompts live in it",
    ),
    Refusal(
        "another eviction policy",
        "--radix-eviction-policy",
        lambda args, model: args.radix_eviction_policy not in ("lru", "priority"),
        "raw spans have to be evicted before compressed ones; allowed: lru, priority",
    ),
    Refusal(
        "sessions",
        "--enable-streaming-session, --enable-session-radix-cache",
        lambda args, model: args.enable_streaming_session or args.enable_session_radix_cache,
        "a session keeps raw KV rows",
    ),
    Refusal("KV canary", "--kv-canary", lambda args, model: args.kv_canary not in (None, "none"), "it expects raw KV"),
    Refusal(
        "diffusion language models",
        "--dllm-algorithm",
        lambda args, model: args.dllm_algorithm is not None,
        "they rewrite their prompt's KV",
    ),
    Refusal("embedding models", "--is-embedding", lambda args, model: args.is_embedding, "they do not decode"),
    Refusal(
        "multi-item scoring", "--enable-mis", lambda args, model: args.enable_mis, "items are told apart by position"
    ),
    Refusal(
        "strip-thinking cache",
        "--strip-thinking-cache",
        lambda args, model: args.strip_thinking_cache,
        "it cuts requests by prompt length",
    ),
    Refusal(
        "unified memory pool",
        "--enable-unified-memory",
        lambda args, model: args.enable_unified_memory,
        "slots are virtual there",
    ),
    Refusal(
        "the Rust server",
        "SGLANG_RUST_SERVER=1",
        lambda args, model: os.getenv("SGLANG_RUST_SERVER", "0").lower() in ("1", "true"),
        "it does not report MetaSoft's fields",
    ),
    Refusal(
        "gRPC and Ray front ends",
        "--smg-grpc-mode, --grpc-mode, --use-ray",
        lambda args, model: args.smg_grpc_mode or args.grpc_mode or args.use_ray,
        "requests are not checked there",
    ),
    Refusal(
        "FP4 KV cache",
        "--kv-cache-dtype",
        lambda args, model: "fp4" in str(args.kv_cache_dtype) or "mxfp8" in str(args.kv_cache_dtype),
        "entries cannot be rewritten one by one",
    ),
    Refusal(
        "the HPC-Ops attention backend with an FP8 KV cache",
        "--attention-backend, --kv-cache-dtype",
        lambda args, model: "hpc_ops" in _backends(args) and "fp8" in str(args.kv_cache_dtype),
        "layers let it turn queries and store entries, and ask once which backend they have",
    ),
    Refusal(
        "an attention backend that does not keep the model's sliding windows",
        "--attention-backend",
        lambda args, model: bool(unkept_windows(model, _backends(args))),
        "its window layers would look for entries that are dropped; allowed: fa3, fa4, trtllm_mha",
    ),
    Refusal(
        "accelerators other than GPUs",
        "--device",
        lambda args, model: str(args.device or "cpu").split(":")[0] not in ("cuda", "cpu"),
        "nothing of it has run there; allowed: cuda, cpu",
    ),
    Refusal(
        "MLA and state-space models",
        MODEL,
        lambda args, model: model.attention_arch.name != "MHA",
        "there are no per-head keys and values",
    ),
    Refusal(
        "hybrids with linear attention or state-space layers",
        MODEL,
        lambda args, model: _has_recurrent_layers(model),
        "layers that are recurrent hold no entries to drop",
    ),
    Refusal(
        "models with a KV pool for sliding windows",
        MODEL,
        lambda args, model: model.is_hybrid_swa,
        "entries of window layers have other slots, which would have to be given out and freed beside the rest",
    ),
    Refusal(
        "encoder-decoder models",
        MODEL,
        lambda args, model: model.is_encoder_decoder,
        "cross attention has a cache of its own",
    ),
    Refusal(
        "models that do not generate",
        MODEL,
        lambda args, model: not model.is_generation,
        "there is nothing to decode",
    ),
)


def tested_version(installed: str) -> str | None:
    """The supported version that ``installed`` is or was made from: ``.postN`` and ``+local`` builds of it count."""
    match = re.fullmatch(r"(\d+\.\d+\.\d+)(\.post\d+)?(\+[A-Za-z0-9.]+)?", installed)
    return match[1] if match and match[1] in SUPPORTED_SGLANG else None


def is_sglang_supported() -> bool:
    """Whether the installed SGLang is one of the supported versions, or a build of one."""
    return tested_version(version("sglang")) is not None


def is_sglang_tested() -> bool:
    """Whether the installed SGLang is exactly one of the supported versions."""
    return version("sglang") in SUPPORTED_SGLANG


def check_sglang_version() -> str:
    """The supported version that the installed SGLang is or was made from.

    Raises:
        ValueError: it is none of them; names them.
    """
    found = tested_version(version("sglang"))
    if found is None:
        raise ValueError(
            f"--enable-metasoft: SGLang {version('sglang')} is not supported; supported: {', '.join(SUPPORTED_SGLANG)}"
        )
    return found


def untested_platform() -> str | None:
    """What this machine runs, if nothing has been tested there and it is not refused either."""
    if torch.version.hip is not None:
        return "ROCm"
    system = platform.system()
    return {"Linux": None, "Darwin": "macOS"}.get(system, system)


def refusals(args: Any, model: Any) -> list[Refusal]:
    """What cannot run together with compression; a model whose class is refused is refused by that name alone.

    Args:
        args: resolved server arguments.
        model: SGLang's ``ModelConfig``.
    """
    found = [refusal for refusal in REFUSED if refusal.is_on(args, model)]
    why = families.why_refused(model)
    if why is not None:
        found = [refusal for refusal in found if refusal.setting != MODEL]
        found.append(of_class(families.class_of(model), why))
    return found


def of_class(name: str, why: str) -> Refusal:
    """The refusal of a model by its class."""
    return Refusal(f"model class {name}", MODEL, lambda args, model: True, why)


def check_features(args: Any, model: Any) -> None:
    """Refuse a server whose features cannot run together with compression; arguments as for :func:`refusals`.

    Raises:
        ValueError: one sentence with the feature, the setting and the reason.
    """
    for refusal in refusals(args, model):
        raise refusal.error


def check_class(model_path: str | None) -> None:
    """Refuse a model by the class that its file names, before SGLang settles anything for it, or fails to.

    Raises:
        ValueError: as :func:`check_features`.
    """
    if model_path and (found := families.refused_in_file(model_path)) is not None:
        raise of_class(*found).error


def support_matrix() -> str:
    """The table of refused features, in Markdown."""
    rows = [f"| {refusal.feature} | `{refusal.setting}` | {refusal.why} |" for refusal in REFUSED]
    return "\n".join(["| refused with `--enable-metasoft` | setting | why |", "|---|---|---|", *rows])
