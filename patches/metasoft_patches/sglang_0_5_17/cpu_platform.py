"""The CPU platform in SGLang 0.5.17, which asks every out-of-tree platform for its KV pool and its allocator.

SGLang loads this while it is being imported itself: what it asks for is imported when it does.
"""

from metasoft_patches.cpu.platform import TorchCpuPlatform


class CpuPlatform(TorchCpuPlatform):
    """With SGLang's own pool of keys and values."""

    def init_backend(self) -> None:
        super().init_backend()
        from sglang.srt.layers.rotary_embedding import mrope
        from sglang.srt.mem_cache import allocation
        from sglang.srt.model_executor import forward_batch_info

        # Here too SGLang goes by the name ``torch_native``; later versions ask the platform.
        for module in (allocation, forward_batch_info, mrope):
            module.support_triton = lambda backend: False

    def get_mha_kv_pool_cls(self) -> type:
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        return MHATokenToKVPool

    def get_paged_allocator_cls(self) -> type:
        from metasoft_patches.sglang_0_5_17.cpu_allocator import TorchPagedAllocator

        return TorchPagedAllocator
