"""SGLang 0.5.23 publishes a request's KV by ``checkpoint``, running or finished."""

from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from metasoft_patches.cache.radix import PrefixPolicy


class RadixCache(PrefixPolicy, UnifiedRadixCache):
    """SGLang's radix cache; what is inserted, and how durably, is the policy's."""

    def checkpoint(self, req, *, up_to: int, **kwargs) -> None:
        self.publish(req, up_to=up_to, **kwargs)

    def insert_row(self, req, *, up_to, priority, **kwargs):
        kept, req.priority = req.priority, priority
        try:
            super().checkpoint(req, up_to=up_to, **kwargs)
        finally:
            req.priority = kept
