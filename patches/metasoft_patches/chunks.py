"""What becomes of a half prefilled prompt whose next chunk does not fit the pool.

SGLang lets the next chunk of a prompt run whatever the pool holds: it counted the whole prompt when it let it in. A
prompt let in at its compressed size can outgrow that, when a compression fails; and those that decode beside it can
outgrow their estimate. Without the guard here the scheduler process ends with "Prefill out of memory".
"""

import logging
from array import array
from http import HTTPStatus

from sglang.srt.managers.schedule_batch import FINISH_ABORT, retract_all

from metasoft_patches.request import RequestState

logger = logging.getLogger(__name__)

MAX_RESTARTS_ALONE = 2


class ChunkGuard:
    """One per scheduler process.

    Args:
        scheduler: SGLang's, fully constructed.
    """

    def __init__(self, scheduler) -> None:
        self.scheduler = scheduler

    def add_chunk(self, original, adder, req):
        """Let the next chunk run if it fits; else let the prompt wait for others, start again, or end.

        Args:
            original: SGLang's ``PrefillAdder.add_chunked_req``.

        Returns:
            The request if it has chunks left, else None.
        """
        chunk_tokens = min(len(req.full_untruncated_fill_ids) - req.prefix_len, adder.rem_chunk_tokens)
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
            logger.warning("MetaSoft: request %s starts again: its next chunk does not fit the KV pool", req.rid)
            state.restarts += 1
            self._start_again(req)
            return None
        self._end(req)
        return original(adder, req)

    def _start_again(self, req) -> None:
        """Free what it holds, to be computed again later."""
        scheduler = self.scheduler
        retract_all(
            reqs=[req],
            req_to_token_pool=scheduler.req_to_token_pool,
            token_to_kv_pool_allocator=scheduler.token_to_kv_pool_allocator,
            tree_cache=scheduler.tree_cache,
            hisparse_coordinator=scheduler.hisparse_coordinator,
        )
        scheduler._add_request_to_queue(req)

    def _end(self, req) -> None:
        """Answer that the prompt does not fit. SGLang ends a request after a prefill only: one more token of it."""
        reason = req.metasoft.failure
        why = f" and could not be compressed ({reason.value})" if reason else ""
        logger.error("MetaSoft: request %s ends at token %d: the KV pool is full%s", req.rid, req.prefix_len, why)
        message = f"The prompt is longer than the free KV pool{why}. Try again."
        req.to_finish = FINISH_ABORT(message, HTTPStatus.SERVICE_UNAVAILABLE, "ServiceUnavailableError")
        req.origin_input_ids = req.origin_input_ids[: req.prefix_len + 1]
        req.full_untruncated_fill_ids = array("q")
        req.refresh_fill_ids()
