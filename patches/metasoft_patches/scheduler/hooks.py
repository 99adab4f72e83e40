"""Hooks inside a scheduler process. Each translates one moment of SGLang's scheduling into a call of the compressor."""

import functools

import numpy as np

from metasoft_patches.adapter import Adapter
from metasoft_patches.cache.prefix_index import FIRST_VIRTUAL_ID
from metasoft_patches.cache.request import RequestState
from metasoft_patches.forward.lora import changes_embedding
from metasoft_patches.hooks.install import verify_hooks
from metasoft_patches.scheduler.admission import Admission
from metasoft_patches.scheduler.chunked_prefill import ChunkedPrefillGuard
from metasoft_patches.scheduler.compressor import SchedulerCompressor
from metasoft_patches.scheduler.positions import PositionShift
from metasoft_patches.scheduler.ranks import with_common_secret
from sglang_metasoft.config import MetaSoftConfig, shown
from sglang_metasoft.request_options import RequestOptions
from sglang_metasoft.types import Bypass, BypassLifetime


class SchedulerHooks:
    """The hooks of one scheduler process, as far as all versions have them; an adapter's subclass adds its own."""

    # Made with the scheduler; no other hook runs before.
    compressor: SchedulerCompressor
    admission: Admission
    prefill_guard: ChunkedPrefillGuard

    def __init__(self, config: MetaSoftConfig, adapter: Adapter) -> None:
        self.config = config
        self.adapter = adapter
        self.positions = PositionShift(adapter)

    def scheduler_made(self, result, scheduler, *args, **kwargs) -> None:
        """AFTER ``Scheduler.__init__``: model, pools and process groups exist."""
        verify_hooks(self.adapter.targets_of("scheduler"))  # once more: others may have put theirs in place meanwhile
        self.config = with_common_secret(self.config)
        self.compressor = SchedulerCompressor(scheduler, self.config, self.adapter)
        self.admission = Admission(scheduler, self.config, self.adapter)
        self.prefill_guard = ChunkedPrefillGuard(scheduler, self.adapter)

    def request_made(self, req, scheduler, recv_req, *args, **kwargs) -> None:
        """A request has arrived; nothing of it is checked yet."""
        options = RequestOptions.parse(req.sampling_params.custom_params)
        state = req.metasoft = RequestState(req, options, self.compressor.sliding_window_tokens)
        prompt_tokens = len(req.origin_input_ids)
        vocab_size = scheduler.model_config.vocab_size
        ids = np.frombuffer(req.origin_input_ids, dtype=np.int64)
        # Places of images may have ids above the vocabulary, which SGLang replaces later.
        limit = FIRST_VIRTUAL_ID if getattr(recv_req, "mm_inputs", None) is not None else vocab_size
        if prompt_tokens and req.to_finish is None and not (0 <= ids.min() and ids.max() < limit):
            # Among them could be virtual ids; and none of them can be computed.
            req.set_finish_with_abort(f"input_ids: an id is outside the vocabulary; allowed: 0 to {vocab_size - 1}")
        if self.compressor.stages.unfit and not self.compressor.stages.is_stale:
            state.set_bypass(Bypass.WEIGHTS, BypassLifetime.REQUEST)
        if recv_req.return_logprob and recv_req.logprob_start_len >= 0:
            state.end_limit_tokens = recv_req.logprob_start_len  # SGLang fills the request's own field later
            if state.end_limit_tokens < prompt_tokens - self.config.window:
                state.set_bypass(Bypass.PROMPT_LOGPROBS, BypassLifetime.REQUEST)
        if changes_embedding(scheduler.tp_worker.model_runner, req.lora_id):
            state.set_bypass(Bypass.LORA, BypassLifetime.REQUEST)
        if getattr(req, "token_indices_to_pool", None) or req.multi_item_delimiter_indices:
            # Read by their places in the raw prompt.
            state.set_bypass(Bypass.PROMPT_LOGPROBS, BypassLifetime.REQUEST)
        if state.named_boundary is not None and state.named_boundary >= prompt_tokens and req.to_finish is None:
            req.set_finish_with_abort(RequestOptions.beyond_prompt(state.named_boundary, prompt_tokens))

    def limit_length(self, original, scheduler, req):
        """AROUND ``Scheduler.init_req_max_new_tokens``: a prompt that is compressed in chunks may exceed the pool."""
        if getattr(req, "metasoft", None) is None:
            return original(scheduler, req)
        return self.admission.limit_length(original, scheduler, req)

    def weights_changed(self, result, *args, **kwargs) -> None:
        """AFTER each step of an update of weights: nothing compressed survives, even if it failed half-way."""
        self.compressor.weights_changed()

    def run_batch(self, original, scheduler, batch, *args, **kwargs):
        """AROUND ``Scheduler.run_batch``, common to both event loops: after it a prefill is just launched."""
        self.compressor.fence.batch_launches()
        result = original(scheduler, batch, *args, **kwargs)
        if batch.forward_mode.is_extend():
            self.compressor.compress_finished(batch)
        self.compressor.update_gauges(batch.reqs)
        return result

    def scheduler_idles(self, result, scheduler, *args, **kwargs) -> None:
        """AFTER ``Scheduler.on_idle``: nothing runs any more."""
        self.compressor.update_gauges(())

    def show_state(self, result, scheduler, *args, **kwargs) -> None:
        """AFTER ``Scheduler.get_internal_state``: ``/server_info`` shows what is active."""
        result.internal_state["metasoft"] = self.compressor.state()

    def match_prefix(self, original, req, tree_cache=None, *args, **kwargs):
        """AROUND ``Req.init_next_round_input``: a waiting request may continue a compressed prefix."""
        state = getattr(req, "metasoft", None)
        if state is None or tree_cache is None or self.adapter.holds_kv(req):
            return original(req, tree_cache, *args, **kwargs)
        match_tree = functools.partial(original, req, tree_cache, *args, **kwargs)
        self.compressor.matcher.match(match_tree, req, self.admission.has_room_for_prefix)

    def cap_prefix(self, max_prefix_len: int, req, input_len: int) -> int | None:
        """AFTER ``Req._compute_max_prefix_len``: the window stays the request's own until its span is compressed."""
        state = getattr(req, "metasoft", None)
        if state is not None and not state.takes_raw_prefix:
            return min(max_prefix_len, state.compressed_slots)
        if state is None or state.plan is None:
            return None
        return min(max_prefix_len, state.plan.end_slots)

    def request_retracted(self, result, req) -> None:
        """AFTER ``Req.reset_for_retract``: the request starts again from its raw prompt."""
        state = getattr(req, "metasoft", None)
        if state is not None:
            state.restart(req)

    def prepare_extend(self, original, batch):
        """AROUND ``ScheduleBatch.prepare_for_extend``: a last guard, and cached tokens in logical length."""
        for req in batch.reqs:
            ids, start = req.full_untruncated_fill_ids, self.adapter.prefix_len(req)
            # An image's places have ids made from its hash, which may be as large; its request is never compact.
            if start < len(ids) and ids[start] >= FIRST_VIRTUAL_ID and req.multimodal_inputs is None:
                raise RuntimeError(f"metasoft: request {shown(req.rid)} would compute a virtual token at {start}")
        result = original(batch)
        for req in batch.reqs:
            state: RequestState | None = getattr(req, "metasoft", None)
            # At the first extend alone: any prefix after it is the request's own work.
            if state is not None and not state.is_reuse_counted:
                state.is_reuse_counted = True
                state.reused_tokens = state.compressed_tokens
                device_slots = self.adapter.prefix_len(req) - self.adapter.loaded_len(req)
                on_device, on_host = state.split_offset(device_slots)
                state.reused_host_tokens = max(state.compressed_tokens - device_slots - on_device, 0)
                req.cached_tokens += state.offset
                req.cached_tokens_device += on_device
                req.cached_tokens_host += on_host
        return result

    def shift_positions(self, forward_batch, cls, batch, model_runner, *args, **kwargs) -> None:
        """AFTER ``ForwardBatch.init_new``: tokens after a compressed span keep their logical RoPE positions."""
        self.positions.apply(forward_batch, batch)

    def report_logical_lengths(self, reqs: list, prompt_tokens: list[int]) -> None:
        """Let the ``prompt_tokens`` of a step's responses count the raw prompts; ``reqs`` are those that respond."""
        for number, req in enumerate(reqs):
            state = getattr(req, "metasoft", None)
            if state is None:
                continue
            if state.owns_prompt(req):
                prompt_tokens[number] = len(state.prompt_ids)
            if self.compressor.metrics is not None and req.finished():
                self.compressor.metrics.request_finished(
                    state.report(), state.reused_host_tokens, state.declined_load_backs
                )

    def extra_slots(self, req, is_admission: bool) -> int:
        """Slots that a request needs beyond SGLang's own count: room for the consolidated entries.

        A request that already holds KV asks for nothing: SGLang would park its next chunk, and others behind it.
        """
        state = getattr(req, "metasoft", None)
        if state is None or state.plan is None or self.adapter.holds_kv(req):
            return 0
        return self.admission.reserve_slots(req, is_admission)

    def add_chunk(self, original, adder, req):
        """AROUND ``PrefillAdder.add_chunked_req``: a chunk that does not fit must not end the process."""
        if getattr(req, "metasoft", None) is None:
            return original(adder, req)
        return self.prefill_guard.add_chunk(original, adder, req)
