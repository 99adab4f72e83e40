"""SGLang 0.5.17 publishes a running request's KV by ``cache_unfinished_req``, and the rest as it finishes."""

import contextlib

from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from metasoft_patches.cache.radix import PrefixPolicy


class RadixCache(PrefixPolicy, UnifiedRadixCache):
    """SGLang's radix cache; what is inserted, and how durably, is the policy's."""

    def cache_unfinished_req(self, req, chunked: bool = False, **kwargs) -> None:
        end = req.extend_range.end
        self.publish(req, up_to=end, chunked=chunked, **kwargs)
        self.adapter.set_prefix(req, self.req_to_token_pool.req_to_token[req.req_pool_idx], end)

    def cache_finished_req(self, req, is_insert: bool = True, **kwargs) -> None:
        with given_priority(req, self.priority_of(req)):
            super().cache_finished_req(req, is_insert, **kwargs)

    def insert_row(self, req, *, up_to, priority, **kwargs):
        extent = req.extend_range
        req.set_extend_range(extent.start, up_to)
        try:
            with given_priority(req, priority):
                super().cache_unfinished_req(req, **kwargs)
        finally:
            req.extend_range = extent


@contextlib.contextmanager
def given_priority(req, priority: int):
    """SGLang takes the priority of what it inserts from the request."""
    kept, req.priority = req.priority, priority
    try:
        yield
    finally:
        req.priority = kept
