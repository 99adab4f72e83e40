"""The only writer of SGLang's KV pool and allocator: reserve slots, write entries, move a request onto them.

A request's row before: ``[compressed | span | tail]``; after: ``[compressed | B new slots | tail]``. The tail's slots
move, the span's go back to the allocator or stay in the radix tree. Nothing in here waits for the device.
"""

from array import array

import torch
from sglang.srt.mem_cache.common import evict_from_tree_cache

from metasoft_patches.adapter import Adapter
from metasoft_patches.cache.radix import PrefixPolicy
from sglang_metasoft.pipeline.batch import Consolidated, FusedBatch, LoopedBatch, Merged
from sglang_metasoft.types import LayerPool, Plan


class Committer:
    """Bound to one scheduler's pools and tree."""

    def __init__(self, tree_cache: PrefixPolicy, adapter: Adapter) -> None:
        self.tree_cache = tree_cache
        self.adapter = adapter
        self.allocator = tree_cache.token_to_kv_pool_allocator
        self.req_to_token_pool = tree_cache.req_to_token_pool
        self.pool = self.allocator.get_kvcache()

    def reserve(self, num_slots: int) -> torch.Tensor | None:
        """Allocate slots (whole pages) for consolidated entries, evicting unlocked tree nodes if need be.

        Returns:
            ``[num_slots]`` int64, or None if the pool has no room.
        """
        evict_from_tree_cache(self.tree_cache, num_slots)
        return self.allocator.alloc(num_slots)

    def release(self, slots: torch.Tensor) -> None:
        """Free reserved slots that were not committed."""
        self.allocator.free_segment(slots, start_pos=0)

    def row(self, req) -> torch.Tensor:
        """``[context]`` int32 view of the request's row in ``req_to_token``."""
        return self.req_to_token_pool.req_to_token[self.adapter.row_index(req)]

    def write(self, layer, pool: LayerPool, batch: FusedBatch | LoopedBatch, entries: Consolidated | Merged) -> None:
        """Write one layer's consolidated entries of all jobs into their new slots.

        Args:
            layer: the model's ``RadixAttention``, for its id and its KV scales.
            pool: the layer's buffers.
            entries: what ``batch`` made of that layer.
        """
        if isinstance(entries, Consolidated) and isinstance(batch, FusedBatch):  # straight from pool to pool
            batch.write(pool, entries)
            return
        assert isinstance(entries, Merged)
        # set_kv_buffer divides by the scales in place when it quantizes: these tensors are ours alone.
        self.pool.set_kv_buffer(
            layer,
            self.adapter.write_location(batch.new_slots),
            *entries.entries,
            layer.k_scale_float,
            layer.v_scale_float,
        )

    def commit(
        self,
        req,
        plan: Plan,
        new_slots: torch.Tensor,
        compact_prompt_ids: array,
        keep_raw: bool,
        insert_tail: bool,
        is_in_tree: bool = False,
    ) -> None:
        """Put the request onto its consolidated entries and insert them into the radix tree.

        The span's slots that the request owns are freed, or, with ``keep_raw``, inserted as raw nodes that are
        unlocked here. Afterwards the request locks the prefix alone. One that SGLang keeps out of the tree inserts
        nothing; its entries are its own.

        Args:
            req: its span is computed up to the end of its last extend; the tree owns nothing past ``plan.end_slots``.
            new_slots: ``[B]`` already written.
            compact_prompt_ids: the prompt with the span's ids replaced by B virtual ids.
            insert_tail: else the tail belongs to the next span and is not inserted.
            is_in_tree: the new slots are the tree's already, in its node for these ids.
        """
        adapter = self.adapter
        row = self.row(req)
        start, end = plan.start_slots, plan.end_slots
        row_end = adapter.row_end(req)
        if keep_raw and end > adapter.protected_len(req):
            self.tree_cache.publish_raw(req, up_to=end)
        protected_len = adapter.protected_len(req)
        owned_from = max(protected_len, start)
        owned_raw = row[owned_from:end].to(torch.int64)
        compact_end = row_end - plan.saved_slots
        moved = torch.cat([new_slots.to(row.dtype), row[end:row_end]])
        row[start:compact_end] = moved
        if end > owned_from:
            self.allocator.free_segment(owned_raw, start_pos=owned_from)

        req.origin_input_ids = compact_prompt_ids
        req.full_untruncated_fill_ids = array("q")
        adapter.refresh_ids(req)
        # Less than the start where an earlier segment was kept out of the tree.
        protected_len = start + plan.kept_slots if is_in_tree else min(protected_len, start)
        adapter.shrink_row(req, saved_slots=plan.saved_slots, protected_len=protected_len)
        # At once: a later insertion would leave a window in which the index knows a prefix that the tree lacks.
        self.tree_cache.publish(req, up_to=compact_end if insert_tail else start + plan.kept_slots)
        adapter.set_prefix(req, row, compact_end)
