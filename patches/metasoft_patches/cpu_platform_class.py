"""The platform class behind :mod:`metasoft_patches.cpu_platform`: plain torch on the CPU."""

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform

DEFAULT_POOL_TOKENS = 65_536
DEFAULT_MEMORY_FRACTION = 0.5


class TorchCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """SGLang on plain torch operations: no kernel library, no graph capture, no pinned memory."""

    _enum = PlatformEnum.OOT

    def apply_server_args_defaults(self, server_args) -> None:
        """Fill in what the user left open: a KV pool that fits a laptop, whatever the model, and torch sampling."""
        if server_args.max_total_tokens is None:
            server_args.max_total_tokens = DEFAULT_POOL_TOKENS
        if server_args.mem_fraction_static is None:
            # Weights and pool together; SGLang takes the smaller of this and the tokens above.
            server_args.mem_fraction_static = DEFAULT_MEMORY_FRACTION
        if server_args.sampling_backend is None:
            server_args.sampling_backend = "pytorch"

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_device(self, device_id: int = 0) -> str:
        # SGLang compares this with device strings.
        return "cpu"

    def get_dispatch_key_name(self) -> str:
        return "native"

    def is_pin_memory_available(self, device=None) -> bool:
        return False
