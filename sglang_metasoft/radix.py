"""The radix tree of a compressing server: SGLang's own, plus the index of compressed prefixes.

Ownership of a request's slots, as half-open ranges of its row: ``[0, cache_protected_len)`` belongs to the tree,
``[cache_protected_len, kv_allocated_len)`` to the request. The raw window after a span must stay the request's own
until the span is compressed, because its slots then move; so nothing past the span's end is inserted before.
"""

import dataclasses

from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.registry import TreeCacheBuildContext, create_unified_radix_cache
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from sglang_metasoft.chains import ChainIndex
from sglang_metasoft.config import MetaSoftConfig

BACKEND_NAME = "metasoft"
# Below all others: raw twins of compressed spans are evicted before everything else.
RAW_PRIORITY = -(1 << 63)


class MetaSoftRadixCache(UnifiedRadixCache):
    """SGLang's radix cache with an index of compressed prefixes and a cap on what raw prefills insert."""

    config: MetaSoftConfig  # set by the factory, before __init__ runs

    def __init__(self, params: CacheInitParams) -> None:
        self.chains = ChainIndex(self.config.index_tokens)
        super().__init__(params)

    def reset(self) -> None:
        """Empty the tree and forget the chains that pointed into it (``flush_cache``, weight updates)."""
        self.chains.clear()
        super().reset()

    def checkpoint(self, req, *, up_to: int, **kwargs) -> None:
        """Insert a request's KV as far as it may be shared.

        A raw request that will be compressed inserts nothing past its span's end, and nothing at all if raw spans
        are not kept. Everything else is SGLang's own checkpoint.
        """
        plan = getattr(getattr(req, "metasoft", None), "plan", None)
        if plan is None or req.finished():
            # With priority scheduling, SGLang gives the lowest of all to requests that name none.
            self._insert(req, max(req.priority or 0, RAW_PRIORITY + 1), up_to=up_to, **kwargs)
            return
        if not self.config.keep_raw:
            return
        page = self.page_size
        cap = min(up_to, plan.end_slots, (up_to - self.config.window) // page * page)
        if cap > req.kv.cache_protected_len:
            self.checkpoint_raw(req, up_to=cap)

    def checkpoint_raw(self, req, *, up_to: int) -> None:
        """Insert a raw span below every other priority, so that memory pressure takes it first."""
        self._insert(req, RAW_PRIORITY, up_to=up_to)

    def _insert(self, req, priority: int, **kwargs) -> None:
        own_priority, req.priority = req.priority, priority
        try:
            super().checkpoint(req, **kwargs)
        finally:
            req.priority = own_priority


def make_factory(config: MetaSoftConfig):
    """The factory to register under :data:`BACKEND_NAME` with ``register_radix_cache_backend``."""

    def factory(ctx: TreeCacheBuildContext) -> UnifiedRadixCache:
        if config.keep_raw and ctx.params.eviction_policy == "lru":
            # "priority" is LRU within one priority; it is what makes raw spans go first.
            ctx.params = dataclasses.replace(ctx.params, eviction_policy="priority")
        cache_class = type(MetaSoftRadixCache.__name__, (MetaSoftRadixCache,), {"config": config})
        return create_unified_radix_cache(ctx, cache_class=cache_class)

    return factory
