"""SGLang 0.5.23 publishes a request's KV by ``checkpoint``, running or finished; its tree may have a host pool."""

import contextlib

from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from metasoft_patches.cache.radix import PrefixPolicy
from metasoft_patches.cache.request import RequestState


class RadixCache(PrefixPolicy, UnifiedRadixCache):
    """SGLang's radix cache; what is inserted, and how durably, is the policy's."""

    load_back_threshold: int  # SGLang's

    def checkpoint(self, req, *, up_to: int, **kwargs) -> None:
        self.publish(req, up_to=up_to, **kwargs)

    def insert_row(self, req, *, up_to, priority, **kwargs):
        kept, req.priority = req.priority, priority
        try:
            super().checkpoint(req, up_to=up_to, **kwargs)
        finally:
            req.priority = kept

    @contextlib.contextmanager
    def kept_off_host(self, req, up_to):
        # As if the request had inserted it before: then SGLang counts no hit, of what lies above a raw twin neither.
        # The request's next insertion counts that one, and may copy it.
        kept = req.kv.cache_inserted_len
        req.kv.cache_inserted_len = max(kept, up_to)
        try:
            yield
        finally:
            req.kv.cache_inserted_len = kept

    def init_load_back(self, params):
        """Load what a request has matched on the host, its compressed prefix in any case whole.

        SGLang computes what it does not load. Virtual tokens cannot be computed: then None, as which the request stays
        in the queue, and its next match passes over the host.
        """
        state: RequestState | None = getattr(params.req, "metasoft", None)
        lacking_slots = state.compressed_slots - params.req.prefix_len if state is not None else 0
        if state is None or lacking_slots <= 0:
            return super().init_load_back(params)
        kept = self.load_back_threshold
        self.load_back_threshold = 1  # loaded however few they are
        try:
            loaded = super().init_load_back(params)
        finally:
            self.load_back_threshold = kept
        if loaded is not None and loaded[0] >= lacking_slots:
            return loaded
        state.decline_load_back()
        return None
