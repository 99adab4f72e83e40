"""What SGLang 0.5.17 calls things; see :class:`metasoft_patches.adapter.Adapter`."""

import torch
from sglang.srt.arg_groups.overrides import resolved_view
from sglang.srt.managers.schedule_batch import retract_all
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.mem_cache.unified_cache.components import ComponentType
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

from metasoft_patches.adapter import Adapter
from metasoft_patches.sglang_0_5_17 import hooks
from metasoft_patches.sglang_0_5_17.radix import RadixCache
from metasoft_patches.sglang_0_5_17.targets import TARGETS

# Settings that later versions have: off.
LATER_SETTINGS = {
    "attn_dp_size": None,
    "enable_kv_cache_sharding": False,
    "enable_unified_cache_external_linker": False,
}


class SGLangAdapter(Adapter):
    version = "0.5.17"
    targets = TARGETS
    hooks = hooks
    cache_class = RadixCache

    def settings(self, server_args):
        return Settings(resolved_view(server_args)), server_args.get_model_config()

    def build_cache(self, context, cache_class):
        context.params.tree_components = (ComponentType.FULL,)
        return cache_class(context.params)

    def prefix_len(self, req):
        return len(req.prefix_indices)

    def host_len(self, req):
        return 0  # a host pool is refused

    def loaded_len(self, req):
        return 0

    def extend_end(self, req):
        return req.extend_range.end

    def row_end(self, req):
        return req.kv.kv_allocated_len

    def protected_len(self, req):
        return req.cache_protected_len

    def holds_kv(self, req):
        return req.kv is not None

    def row_index(self, req):
        return req.req_pool_idx

    def refresh_ids(self, req):
        req._refresh_fill_ids()

    def tenant(self, req):
        return (req.extra_key, None)  # SGLang makes a client's cache_salt part of extra_key

    def is_beam_search(self, req):
        return False  # this version has none

    def is_watermarked(self, req):
        return False  # this version has none

    def shrink_row(self, req, *, saved_slots, protected_len):
        end = req.extend_range.end - saved_slots
        req.set_extend_range(end, end)
        req.already_computed = end
        req.kv.kv_allocated_len -= saved_slots
        req.kv_committed_len -= saved_slots
        req.cache_protected_len = protected_len

    def set_prefix(self, req, row, end):
        req.prefix_indices = row[:end].to(torch.int64, copy=True)

    def request_of_rows(self, batch):
        return list(range(len(batch.reqs)))

    def retract(self, scheduler, req):
        retract_all(
            reqs=[req],
            server_args=scheduler.server_args,
            req_to_token_pool=scheduler.req_to_token_pool,
            token_to_kv_pool_allocator=scheduler.token_to_kv_pool_allocator,
            tree_cache=scheduler.tree_cache,
            hisparse_coordinator=scheduler.hisparse_coordinator,
        )

    def write_location(self, slots):
        return KVWriteLoc(slots)

    def forward_scope(self, model, backend, forward_batch):
        return forward_context(ForwardContext(attn_backend=backend))

    def plan_attention(self, model_runner, forward_batch):
        model_runner.attn_backend.init_forward_metadata(forward_batch)


class Settings:
    """Server arguments, with those of later versions at their value for off."""

    def __init__(self, resolved) -> None:
        self._resolved = resolved

    def __getattr__(self, name: str):
        return LATER_SETTINGS[name] if name in LATER_SETTINGS else getattr(self._resolved, name)
