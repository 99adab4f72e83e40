"""Which form a waiting request takes, raw or over a compressed prefix: the one that leaves the least to compute.

What lies in the host pool alone counts as found: it is loaded back on admission. Of equals the longest compressed
prefix comes first, raw last, wherever they lie: a raw prompt on the device would have to be compressed once more.
"""

from collections.abc import Callable

from metasoft_patches.adapter import Adapter
from metasoft_patches.cache.namespaces import Namespaces
from metasoft_patches.cache.prefix_index import CompressedPrefix, Found
from metasoft_patches.cache.radix import PrefixPolicy
from metasoft_patches.cache.request import RequestState
from metasoft_patches.scheduler.admission import bypass_reason
from sglang_metasoft.config import MetaSoftConfig
from sglang_metasoft.types import BypassLifetime

# Compressed prefixes of one prompt that are tried against the tree; more exist only where prompts nearly repeat.
MAX_CANDIDATES = 3
GONE = -1  # matched tokens of a compressed prefix that the tree has evicted, from the host too


class PrefixMatcher:
    """One per scheduler process.

    Args:
        config: the server's settings.
        adapter: of this SGLang.
        tree_cache: the radix tree, and the index of its compressed prefixes.
        namespaces: of the requests.
    """

    def __init__(
        self, config: MetaSoftConfig, adapter: Adapter, tree_cache: PrefixPolicy, namespaces: Namespaces
    ) -> None:
        self.config, self.adapter, self.namespaces = config, adapter, namespaces
        self.index, self.page_size = tree_cache.prefixes, tree_cache.page_size

    def match(self, match_tree: Callable[[], None], req, has_room: Callable[[object], bool]) -> None:
        """Match a waiting request against the tree; its state, its ids and what SGLang notes of it say what was found.

        Args:
            match_tree: matches the request as it is then, as SGLang does.
            has_room: whether the pool can hold the raw prefix that was found beside its compression; else nothing raw
                is taken from the tree.
        """
        state: RequestState = req.metasoft
        state.restart(req)
        state.adopt_prompt(req)
        state.generation = self.namespaces.generation
        if reason := bypass_reason(req, self.adapter):
            state.set_bypass(reason, BypassLifetime.REQUEST)
        found = self._look_up(req)
        self._take_best(match_tree, req, found)
        if not has_room(req):
            state.takes_raw_prefix = False
            self._take_best(match_tree, req, found)
        state.avoids_host = False  # a request that is not admitted now may find room to load into later
        if state.compressed is not None:
            self.index.touch(state.compressed)

    def _look_up(self, req) -> Found:
        """The one question to the index: which compressed prefixes may serve, and how much of the prompt is known."""
        state: RequestState = req.metasoft
        if state.is_bypassed:
            return Found([], 0, 0)
        tenant, namespace = self.namespaces.tenant(req), self.namespaces.namespace(req)
        found = self.index.match(tenant, namespace, state.logical_ids(req), len(state.prompt_ids), MAX_CANDIDATES)
        limit = state.end_limit_tokens
        return found._replace(prefixes=[prefix for prefix in found.prefixes if limit is None or prefix.tokens <= limit])

    def _take_best(self, match_tree: Callable[[], None], req, found: Found) -> None:
        """Try each form and leave the request in the best one; of equals, in the first."""
        state: RequestState = req.metasoft
        all_tokens = len(state.prompt_ids) + len(req.output_ids)
        best, most_tokens = None, GONE
        for prefix in (*found.prefixes, None):
            tokens = self._take(match_tree, req, found, prefix)
            if tokens > most_tokens:
                best, most_tokens = prefix, tokens
            if tokens == all_tokens - 1:
                break  # nothing can match more
        if state.compressed is not best:
            self._take(match_tree, req, found, best)

    def _take(self, match_tree: Callable[[], None], req, found: Found, prefix: CompressedPrefix | None) -> int:
        """Match in compact form with this compressed prefix, or raw.

        Returns:
            The logical tokens that need no computing, or GONE.
        """
        state: RequestState = req.metasoft
        state.restore_raw(req)
        if prefix is not None:
            state.use_prefix(req, prefix)
        state.plan = None  # which would cap the match at its span's end
        match_tree()
        matched_slots = self.adapter.prefix_len(req) + self.adapter.host_len(req)
        if prefix is not None and matched_slots < prefix.slots:
            self.index.discard(prefix)
            return GONE
        if prefix is not None and state.avoids_host and self.adapter.prefix_len(req) < prefix.slots:
            return GONE  # for this time
        state.update_boundary(matched_slots + state.offset, found, self.page_size)
        state.make_plan(self.config, self.page_size)
        if state.plan is not None and matched_slots > state.plan.end_slots:
            match_tree()
        host_slots = 0 if state.avoids_host else self.adapter.host_len(req)
        return self.adapter.prefix_len(req) + host_slots + state.offset
