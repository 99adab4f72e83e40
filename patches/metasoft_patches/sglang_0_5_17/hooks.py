"""Hooks that only SGLang 0.5.17 has; names as in its ``targets.py``."""

from metasoft_patches.http.headers import REPORT_FIELDS
from metasoft_patches.scheduler import hooks as scheduler


async def flatten_responses(original, manager, *args, **kwargs):
    """AROUND ``TokenizerManager._wait_one_response``: our fields are one value a response, not one a token."""
    async for response in original(manager, *args, **kwargs):
        meta_info = response.get("meta_info", {})
        for name in REPORT_FIELDS:
            values = meta_info.pop(name, None)
            if values and values[-1] is not None:
                meta_info[name] = values[-1]
        yield response


class SchedulerHooks(scheduler.SchedulerHooks):
    """The hooks of one scheduler process."""

    arriving = None  # what the request that is being created came as

    def request_arrives(self, original, scheduler, recv_req):
        """AROUND ``Scheduler.handle_generate_request``, which makes the request itself."""
        self.arriving = recv_req
        try:
            return original(scheduler, recv_req)
        finally:
            self.arriving = None

    def request_created(self, result, scheduler, req) -> None:
        """AFTER ``Scheduler._maybe_namespace_elastic_radix_cache``, the first that sees the request it made."""
        if self.arriving is not None:
            self.request_made(req, scheduler, self.arriving)

    def reserve_slots(self, reserve: int, adder, req) -> int:
        """AFTER ``PrefillAdder._mamba_gap_budget_for_req``, which is 0 for the models that we serve."""
        is_admission = not (adder.can_run_list and adder.can_run_list[-1] is req)  # in the list, it is charged
        return reserve + self.extra_slots(req, is_admission)

    def report(self, original, accumulator, *, req):
        """AROUND ``_GenerationStreamAccumulator.accept``: our fields go with each response, once for every token."""
        before = len(accumulator.output_ids)
        result = original(accumulator, req=req)
        if len(accumulator.output_ids) > before:
            last = accumulator.prompt_tokens[-1:]
            self.report_logical_lengths([req], last)
            accumulator.prompt_tokens[-1:] = last
            state = getattr(req, "metasoft", None)
            fields = state.report() if state is not None else {}
            tokens = [len(ids) for ids in accumulator.output_ids]
            for name in REPORT_FIELDS:
                # One list for each request; SGLang adds those of requests that bring nothing of their own.
                lists = accumulator.customized_info.setdefault(name, [[None] * count for count in tokens])
                lists[-1] = [fields.get(name)] * max(tokens[-1], 1)
        return result
