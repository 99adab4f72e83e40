"""What becomes of a half prefilled prompt whose next chunk does not fit the pool.

SGLang lets the next chunk of a prompt run whatever the pool holds: it counted the whole prompt when it let it in. A
prompt let in at its compressed size can outgrow that, when a compression fails; and those that decode beside it can
outgrow their estimate. Without the guard here the scheduler process ends with "Prefill out of memory".
"""

import logging
from array import array
from http import HTTPStatus

from sglang.srt.managers.schedule_batch import FINISH_ABORT

from metasoft_patches.adapter import Adapter
from metasoft_patches.cache.request import RequestState
from sglang_metasoft.config import shown
from sglang_metasoft.types import Bypass, BypassLifetime

logger = logging.getLogger(__name__)

MAX_RESTARTS_ALONE = 2


class ChunkedPrefillGuard:
    """One per scheduler process.

    Args:
        scheduler: SGLang's, fully constructed.
        adapter: of this SGLang.
    """

    def __init__(self, scheduler, adapter: Adapter) -> None:
        self.scheduler = scheduler
        self.adapter = adapter

    def add_chunk(self, original, adder, req):
        """Let the next chunk run if it fits; else let the prompt wait for others, start again, or end.

        Args:
            original: SGLang's ``PrefillAdder.add_chunked_req``.

        Returns:
            The request if it has chunks left, else None.
        """
        left = len(req.full_untruncated_fill_ids) - self.adapter.prefix_len(req)
        chunk_tokens = min(left, adder.rem_chunk_tokens)
        if adder.ceil_paged_tokens(chunk_tokens) + adder.page_size <= adder.cur_rem_tokens:
            return original(adder, req)
        state: RequestState = req.metasoft
        running = adder.running_batch
        is_alone = running.is_empty()
        if req.inflight_middle_chunks > 0 or not is_alone and running.check_decode_mem():
            # Those that decode will leave. Until then nobody is let in: SGLang would count this request with them.
            adder.rem_chunk_tokens = 0
            return req
        if not is_alone or state.restarts < MAX_RESTARTS_ALONE:
            logger.warning("MetaSoft: request %s starts again: its next chunk does not fit the KV pool", shown(req.rid))
            state.restarts += 1
            self._start_again(req)
            return None
        self._end(req)
        return original(adder, req)

    def _start_again(self, req) -> None:
        """Free what it holds, to be computed again later."""
        self.adapter.retract(self.scheduler, req)
        self.scheduler._add_request_to_queue(req)

    def _end(self, req) -> None:
        """Answer that the prompt does not fit. SGLang ends a request after a prefill only: one more token of it."""
        reason, computed = req.metasoft.bypasses.get(BypassLifetime.CHUNK), self.adapter.prefix_len(req)
        # What is left of its prompt is no longer the one planned for.
        req.metasoft.set_bypass(reason or Bypass.NO_FREE_SLOTS, BypassLifetime.SCHEDULE)
        why = f" and could not be compressed ({reason.value})" if reason else ""
        logger.error("MetaSoft: request %s ends at token %d: the KV pool is full%s", shown(req.rid), computed, why)
        message = f"The prompt is longer than the free KV pool{why}. Try again."
        req.to_finish = FINISH_ABORT(message, HTTPStatus.SERVICE_UNAVAILABLE, "ServiceUnavailableError")
        req.origin_input_ids = req.origin_input_ids[: computed + 1]
        req.full_untruncated_fill_ids = array("q")
        self.adapter.refresh_ids(req)
