"""The platform class behind :mod:`metasoft_patches.cpu`: plain torch on the CPU."""

import logging
import os

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform

from metasoft_patches.cpu import DEFAULT_MEMORY_FRACTION, DEFAULT_POOL_TOKENS

THREAD_BINDING = "SGLANG_CPU_OMP_THREADS_BIND"

logger = logging.getLogger(__name__)


class TorchCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """SGLang on plain torch operations: no kernel library, no graph capture, no pinned memory."""

    attention_backend = "torch_rows"
    _enum = PlatformEnum.OOT
    _binding: str | None = None  # what this process set

    def apply_server_args_defaults(self, server_args) -> None:
        """Fill in what the user left open: a KV pool that fits a laptop, a type that is fast here, torch sampling."""
        if server_args.max_total_tokens is None:
            server_args.max_total_tokens = DEFAULT_POOL_TOKENS
        if server_args.mem_fraction_static is None:
            # Weights and pool together; SGLang takes the smaller of this and the tokens above.
            server_args.mem_fraction_static = DEFAULT_MEMORY_FRACTION
        if server_args.dtype == "auto" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            # There bf16 products are emulated: several times slower than float32 ones.
            logger.info("This CPU has no bf16 instructions: the model runs in float32 (--dtype bfloat16 overrides).")
            server_args.dtype = "float32"
        if server_args.attention_backend in (None, "intel_amx"):  # SGLang's default on a CPU, for a library of kernels
            server_args.attention_backend = self.attention_backend
        if server_args.sampling_backend is None:
            server_args.sampling_backend = "pytorch"
        self.bind_threads(server_args.tp_size * server_args.dp_size * server_args.pp_size)

    def bind_threads(self, ranks: int) -> None:
        """Share the cores out, unless the user did: SGLang gives each rank a NUMA node and refuses more ranks.

        What an earlier engine in this process got is replaced: SGLang refuses a binding for another number of ranks.
        """
        if os.environ.get(THREAD_BINDING) != self._binding:
            return
        self._binding = spread_cores(sorted(os.sched_getaffinity(0)), ranks) if ranks > 1 else None
        if self._binding is None:
            os.environ.pop(THREAD_BINDING, None)
        else:
            os.environ[THREAD_BINDING] = self._binding

    def get_default_attention_backend(self) -> str:
        return self.attention_backend

    def init_backend(self) -> None:
        """Called in each worker before the model is built."""
        from sglang.srt.layers.attention.attention_registry import register_attention_backend
        from sglang.srt.mem_cache import allocation

        from metasoft_patches.cpu.host_pool import allow_host_pool
        from metasoft_patches.cpu.lora import allow_pageable_memory

        register_attention_backend(self.attention_backend)(create_attention_backend)
        # SGLang knows by the name ``torch_native`` alone that there is no Triton here.
        allocation.get_last_loc_triton = allocation.get_last_loc_torch
        allow_pageable_memory()
        allow_host_pool()

    def get_device(self, device_id: int = 0) -> str:
        # SGLang compares this with device strings.
        return "cpu"

    def get_dispatch_key_name(self) -> str:
        return "native"

    def is_pin_memory_available(self, device=None) -> bool:
        return False


def create_attention_backend(runner):
    """For SGLang's registry: the backend of one model runner."""
    from metasoft_patches.cpu.attention import TorchRowsBackend

    return TorchRowsBackend(runner)


def spread_cores(cores: list[int], ranks: int) -> str:
    """Cores for each rank, in SGLang's notation (``0,1|2,3``); shared in turn where there are more ranks than cores."""
    share = max(len(cores) // ranks, 1)
    groups = [[cores[(rank * share + n) % len(cores)] for n in range(share)] for rank in range(ranks)]
    return "|".join(",".join(map(str, group)) for group in groups)
