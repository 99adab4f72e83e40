"""What of a request goes into the radix tree of a compressing server, and the index of compressed prefixes.

Ownership of a request's slots, as half-open ranges of its row: ``[0, protected_len)`` belongs to the tree, the rest to
the request. The raw window after a span must stay the request's own until the span is compressed, because its slots
then move; so nothing past the span's end is inserted before.
"""

import contextlib
import dataclasses
from abc import ABC, abstractmethod
from typing import Any

from metasoft_patches.adapter import Adapter
from metasoft_patches.cache.prefix_index import PrefixIndex
from sglang_metasoft.config import MetaSoftConfig

# Below all others: raw twins of compressed spans are evicted before everything else.
RAW_PRIORITY = -(1 << 63)
# Of everything else. The highest, because SGLang inserts a prompt one above its output where there is one above.
PRIORITY = (1 << 63) - 1


class PrefixPolicy(ABC):
    """Comes before SGLang's radix cache among the bases of an adapter's cache class."""

    # Set by the factory, before __init__ runs.
    config: MetaSoftConfig
    adapter: Adapter
    follows_request_priority: bool  # the operator chose to evict by it
    # Of SGLang's radix cache, the next base.
    page_size: int
    req_to_token_pool: Any
    token_to_kv_pool_allocator: Any

    def __init__(self, params) -> None:
        self.prefixes = PrefixIndex(self.config.index_tokens)
        super().__init__(params)  # type: ignore[call-arg]

    def reset(self) -> None:
        """Empty the tree and forget the prefixes that pointed into it (``flush_cache``, weight updates)."""
        self.prefixes.clear()
        super().reset()  # type: ignore[misc]

    @abstractmethod
    def insert_row(self, req, *, up_to: int, priority: int, **kwargs) -> None:
        """Insert the first ``up_to`` entries of a request's row and move its lock onto them, as SGLang does.

        Args:
            priority: among nodes of the tree; the lowest are evicted first.
            kwargs: what SGLang passed besides.
        """

    def publish(self, req, *, up_to: int, **kwargs) -> None:
        """Insert a request's KV as far as it may be shared.

        A raw request that will be compressed inserts nothing past its span's end, and nothing at all if raw spans
        are not kept. Everything else is inserted as SGLang would; what it keeps out of the tree is not inserted.
        """
        if req.skip_radix_cache_insert:
            return
        plan = getattr(getattr(req, "metasoft", None), "plan", None)
        if plan is None or req.finished():
            self.insert_row(req, up_to=up_to, priority=self.priority_of(req), **kwargs)
            return
        if not self.config.keep_raw:
            return
        page = self.page_size
        cap = min(up_to, plan.end_slots, (up_to - self.config.window) // page * page)
        if cap > self.adapter.protected_len(req):
            self.publish_raw(req, up_to=cap)

    def publish_raw(self, req, *, up_to: int) -> None:
        """Insert a raw span below every other priority, so that memory pressure takes it first."""
        if not req.skip_radix_cache_insert:
            with self.kept_off_host(req, up_to):
                self.insert_row(req, up_to=up_to, priority=RAW_PRIORITY)

    def kept_off_host(self, req, up_to: int) -> contextlib.AbstractContextManager:
        """In which a row that is inserted so far is not copied to a host pool: raw twins would take most of it."""
        return contextlib.nullcontext()

    def priority_of(self, req) -> int:
        """In the tree, of what is no raw twin: the same for all, whatever a client asks for when it is scheduled.

        Only where the operator has chosen to evict by priority it is the request's own, above every raw twin.
        """
        return max(req.priority or 0, RAW_PRIORITY + 1) if self.follows_request_priority else PRIORITY


def make_factory(config: MetaSoftConfig, adapter: Adapter):
    """The factory to register under :data:`BACKEND_NAME` with ``register_radix_cache_backend``."""

    def factory(context):
        follows_request_priority = context.params.eviction_policy == "priority"
        if config.keep_raw and context.params.eviction_policy == "lru":
            # "priority" is LRU within one priority; it is what makes raw spans go first.
            context.params = dataclasses.replace(context.params, eviction_policy="priority")
        attributes = {"config": config, "adapter": adapter, "follows_request_priority": follows_request_priority}
        return adapter.build_cache(context, type("MetaSoftRadixCache", (adapter.cache_class,), attributes))

    return factory
