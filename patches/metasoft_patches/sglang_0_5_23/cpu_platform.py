"""The CPU platform in SGLang 0.5.23: pool and allocator are SGLang's own choice."""

from metasoft_patches.cpu.platform import TorchCpuPlatform


class CpuPlatform(TorchCpuPlatform):
    """As it is."""
