"""Whether and at which size a request is let in: reasons to leave it raw, its length limit, the slots set aside."""

from sglang.srt.managers.schedule_policy import CLIP_MAX_NEW_TOKENS
from sglang.srt.managers.utils import validate_input_length
from sglang.srt.runtime_context import get_serving

from metasoft_patches.adapter import Adapter
from metasoft_patches.cache.request import RequestState
from sglang_metasoft.config import MetaSoftConfig
from sglang_metasoft.pipeline.plan import Footprint, chunked_footprint
from sglang_metasoft.types import Bypass, Plan


class Admission:
    """One per scheduler process.

    Args:
        scheduler: SGLang's, fully constructed.
        config: the server's settings.
        adapter: of this SGLang.
    """

    def __init__(self, scheduler, config: MetaSoftConfig, adapter: Adapter) -> None:
        self.scheduler = scheduler
        self.config = config
        self.adapter = adapter
        self.page_size = scheduler.page_size
        # Whether a prompt is compressed while it is prefilled.
        self.compresses_chunks = config.during_prefill and bool(scheduler.chunked_prefill_size)
        self.raw_input_limit = scheduler.max_req_input_len
        if self.compresses_chunks:
            # A prompt may be longer than the pool: each one is checked at its compressed size.
            scheduler.max_req_len = scheduler.model_config.context_len - 1
            scheduler.max_req_input_len = scheduler.max_req_len - 5

    def reserve_slots(self, req, is_admission: bool) -> int:
        """Slots, beyond SGLang's own count, that a request needs while it is prefilled and compressed.

        Raw span and consolidated entries exist side by side for a moment. With ``during_prefill`` a long prompt never
        exists raw as a whole, so its admission asks for less than its raw length: the result is negative.

        Args:
            is_admission: the request is asking to be admitted; else a chunk of it is being charged.
        """
        plan: Plan = req.metasoft.plan
        prefix_slots = self.adapter.prefix_len(req)
        raw_slots = len(req.full_untruncated_fill_ids) - prefix_slots
        # As much of the output as SGLang sets room aside for, too.
        new_tokens = min(max(req.sampling_params.max_new_tokens - len(req.output_ids), 0), CLIP_MAX_NEW_TOKENS)
        wanted = raw_slots + plan.kept_slots + new_tokens + 2 * self.page_size
        fits_raw = prefix_slots + wanted < self.scheduler.max_total_num_tokens
        # Once it had to start again it asks for its raw size, if the pool has that.
        if self.compresses_chunks and is_admission and not (fits_raw and req.metasoft.restarts):
            footprint = self._footprint(req, prefix_slots + self.adapter.host_len(req))
            if self._fits(footprint):
                # SGLang adds the new tokens to the result.
                held = max(footprint.peak_slots - new_tokens, footprint.final_slots + len(req.output_ids))
                return held - prefix_slots - raw_slots
        return plan.kept_slots if fits_raw else 0

    def has_room_for_prefix(self, req) -> bool:
        """Whether the pool can hold the raw prefix that was found in the tree and, beside it, its compression."""
        if not self.compresses_chunks or req.metasoft.plan is None:
            return True
        prefix_slots = self.adapter.prefix_len(req) + self.adapter.host_len(req)
        return self._fits(self._footprint(req, prefix_slots)) or not self._fits(self._footprint(req))

    def _footprint(self, req, prefix_slots: int = 0) -> Footprint:
        state: RequestState = req.metasoft
        return chunked_footprint(
            self.config,
            prompt_tokens=len(state.prompt_ids),
            chunk_tokens=self.scheduler.chunked_prefill_size,
            page_size=self.page_size,
            **state.compressed_lengths,
            raw_tokens=max(prefix_slots - state.compressed_slots, 0),
            boundary_tokens=state.boundary_tokens,
            end_limit_tokens=state.end_limit_tokens,
            sliding_window_tokens=state.sliding_window_tokens,
            options=state.options,
        )

    def _fits(self, footprint: Footprint) -> bool:
        return footprint.peak_slots + 2 * self.page_size < self.scheduler.max_total_num_tokens

    def limit_length(self, limit_output, scheduler, req) -> None:
        """Hold an arriving request to what the pool can hold of it: compressed chunk by chunk, if it will be.

        Args:
            limit_output: SGLang's ``Scheduler.init_req_max_new_tokens``, which assumes the raw prompt.
        """
        saved = 0
        pool_slots = scheduler.max_total_num_tokens
        if self.compresses_chunks and not req.finished() and req.to_finish is None:
            footprint = Footprint(len(req.origin_input_ids), len(req.origin_input_ids))
            if bypass_reason(req, self.adapter) is None and not req.metasoft.is_bypassed:
                footprint = self._footprint(req)
            if self._fits(footprint):
                saved = len(req.origin_input_ids) - footprint.final_slots
            elif error := validate_input_length(req, self.raw_input_limit, get_serving().allow_auto_truncate):
                req.set_finish_with_abort(error)
        scheduler.max_total_num_tokens = pool_slots + saved
        try:
            limit_output(scheduler, req)
        finally:
            scheduler.max_total_num_tokens = pool_slots


def bypass_reason(req, adapter: Adapter) -> Bypass | None:
    """Why compression cannot serve this request, or None. Lengths are the policy's business, not this table's."""
    checks = (
        (req.multimodal_inputs is not None, Bypass.MULTIMODAL),
        (req.input_embeds is not None, Bypass.INPUT_EMBEDS),
        (req.positional_embed_overrides is not None, Bypass.EMBED_OVERRIDES),
        # A session_id alone means nothing without --enable-session-radix-cache, which is refused.
        (req.session is not None, Bypass.SESSION),
        (adapter.is_beam_search(req), Bypass.BEAM_SEARCH),
        (req.custom_logit_processor is not None, Bypass.CUSTOM_LOGIT_PROCESSOR),
        (adapter.is_watermarked(req), Bypass.WATERMARK),
        (req.return_routed_experts or req.return_indexer_topk, Bypass.ROUTED_EXPERTS),
    )
    return next((reason for holds, reason in checks if holds), None)
