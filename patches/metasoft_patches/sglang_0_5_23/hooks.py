"""Hooks that only SGLang 0.5.23 has; names as in its ``targets.py``."""

from sglang.srt.managers.io_struct import AttachHiCacheStorageReqOutput

from metasoft_patches.compat import STORAGE
from metasoft_patches.http.headers import REPORT_FIELDS
from metasoft_patches.scheduler import hooks as scheduler


def flatten_meta_info(original, manager, meta_info: dict, state, customized_info: dict, index: int, finish_reason):
    """AROUND ``TokenizerManager.update_request_meta_info``: our fields are one value a response, not one a token."""
    others = {}
    for key, values in customized_info.items():
        if key not in REPORT_FIELDS:
            others[key] = values
        elif values[index] is not None:
            meta_info[key] = values[index]
    return original(manager, meta_info, state, others, index, finish_reason)


class SchedulerHooks(scheduler.SchedulerHooks):
    """The hooks of one scheduler process."""

    def generation_req_created(self, req, scheduler, recv_req, *args, **kwargs) -> None:
        """AFTER ``Scheduler._create_generation_req``."""
        self.request_made(req, scheduler, recv_req)

    def output_streamer_class(self, streamer_class, scheduler) -> type:
        """AFTER ``Scheduler.get_output_streamer_class``: one that adds our fields to each response."""
        return make_reporting_streamer(streamer_class)

    def refuse_storage(self, original, scheduler, recv_req):
        """AROUND ``Scheduler.attach_hicache_storage_wrapped``: refused at start, and so it is while the server runs."""
        message = f"--enable-metasoft cannot run with {STORAGE.feature} ({STORAGE.setting}): {STORAGE.why}"
        return AttachHiCacheStorageReqOutput(success=False, message=message)

    def report_lengths(self, original, accumulator, **kwargs):
        """AROUND ``_GenerationStreamAccumulator.to_payload``: once a step, not once a request of it."""
        self.report_logical_lengths(accumulator.output_reqs, accumulator.prompt_tokens)
        return original(accumulator, **kwargs)

    def reserve_slots(self, reserve: int, adder, req, *, extend_input_len: int | None = None) -> int:
        """AFTER ``PrefillAdder._request_slot_reserve_for_req``; a length is given when a chunk of it is charged."""
        return reserve + self.extra_slots(req, is_admission=extend_input_len is None)


def make_reporting_streamer(streamer_class: type) -> type:
    """A subclass of SGLang's output streamer whose responses carry the ``metasoft_*`` fields."""

    class ReportingStreamer(streamer_class):
        has_additional_customized_info = True

        def build_additional_customized_info(self, reqs) -> dict[str, list]:
            info = super().build_additional_customized_info(reqs)
            states = [getattr(req, "metasoft", None) for req in reqs]
            reports = [state.report() if state is not None else {} for state in states]
            return info | {name: [report.get(name) for report in reports] for name in REPORT_FIELDS}

    return ReportingStreamer
