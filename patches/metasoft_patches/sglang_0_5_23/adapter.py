"""What SGLang 0.5.23 calls things; see :class:`metasoft_patches.adapter.Adapter`."""

import contextlib

from sglang.srt.arg_groups.model_override_base import model_config_of, resolving_view
from sglang.srt.managers.schedule_batch import retract_all
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.mem_cache.registry import create_unified_radix_cache
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.runtime_context import get_model

from metasoft_patches.adapter import Adapter
from metasoft_patches.sglang_0_5_23 import hooks
from metasoft_patches.sglang_0_5_23.radix import RadixCache
from metasoft_patches.sglang_0_5_23.targets import TARGETS


class SGLangAdapter(Adapter):
    version = "0.5.23"
    targets = TARGETS
    hooks = hooks
    cache_class = RadixCache

    def settings(self, server_args):
        return resolving_view(server_args), model_config_of(server_args)

    def build_cache(self, context, cache_class):
        return create_unified_radix_cache(context, cache_class=cache_class)

    def prefix_len(self, req):
        return req.prefix_len

    def host_len(self, req):
        return req.host_hit_length

    def loaded_len(self, req):
        return req.materialized_host_hit_len()

    def extend_end(self, req):
        return req.extend_end

    def row_end(self, req):
        return req.kv.kv_allocated_len

    def protected_len(self, req):
        return req.kv.cache_protected_len

    def holds_kv(self, req):
        return req.kv.holds_kv

    def row_index(self, req):
        return req.kv.req_pool_idx

    def refresh_ids(self, req):
        req.refresh_fill_ids()

    def tenant(self, req):
        return (req.extra_key, req.cache_salt)

    def is_beam_search(self, req):
        return req.beam_group is not None

    def is_watermarked(self, req):
        return req.sampling_params.watermark is not None

    def shrink_row(self, req, *, saved_slots, protected_len):
        req.extend_end -= saved_slots
        req.already_computed = req.extend_end
        req.kv.kv_allocated_len -= saved_slots
        req.kv.kv_committed_len -= saved_slots
        req.kv.cache_protected_len = protected_len
        req.kv.cache_inserted_len = min(req.kv.cache_inserted_len, protected_len)

    def set_prefix(self, req, row, end):
        req.prefix_len = end

    def request_of_rows(self, batch):
        rows = list(range(len(batch.reqs)))
        if batch.beam_tail is not None:
            for beams in batch.beam_tail.entries:
                rows += [beams.leader_idx] * (beams.end - beams.start)
        return rows

    def retract(self, scheduler, req):
        retract_all(
            reqs=[req],
            req_to_token_pool=scheduler.req_to_token_pool,
            token_to_kv_pool_allocator=scheduler.token_to_kv_pool_allocator,
            tree_cache=scheduler.tree_cache,
            hisparse_coordinator=scheduler.hisparse_coordinator,
        )

    def write_location(self, slots):
        return KVWriteLoc(slots, None, physical=True)

    @contextlib.contextmanager
    def forward_scope(self, model, backend, forward_batch):
        with (
            get_model().override(shared_experts=model.shared_experts_config),
            forward_context(ForwardContext(attn_backend=backend), forward_batch=forward_batch),
        ):
            yield

    def plan_attention(self, model_runner, forward_batch):
        translator = model_runner.kv_index_translator
        translator.own_plan(forward_batch).bind(forward_batch, translator)
        model_runner.attn_backend.init_forward_metadata(forward_batch)
