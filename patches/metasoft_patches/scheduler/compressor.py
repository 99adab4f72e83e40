"""Compression inside one scheduler process: picks requests after a prefill, has them compressed, commits the result."""

import logging
from array import array
from typing import Any, NamedTuple

import torch

from metasoft_patches.adapter import Adapter
from metasoft_patches.cache.commit import Committer
from metasoft_patches.cache.namespaces import Namespaces
from metasoft_patches.cache.prefix_index import CompressedPrefix, make_virtual_ids
from metasoft_patches.cache.request import RequestState
from metasoft_patches.forward.fidelity import FidelitySampler
from metasoft_patches.forward.model_shape import model_shape
from metasoft_patches.forward.runner import ProbeRunner
from metasoft_patches.forward.served_model import examine
from metasoft_patches.metrics import Metrics
from metasoft_patches.scheduler.fence import LaunchFence
from metasoft_patches.scheduler.matching import PrefixMatcher
from metasoft_patches.scheduler.ranks import InStepFault, Outcome, Ranks
from metasoft_patches.transfer import to_device
from sglang_metasoft.config import MetaSoftConfig, settings_of, shown
from sglang_metasoft.types import Bypass, BypassLifetime, Plan, longest_window

logger = logging.getLogger(__name__)


class Chosen(NamedTuple):
    """A span that is to be compressed."""

    position: int  # of its request in the batch
    req: Any  # SGLang's Req
    plan: Plan


class Twin(NamedTuple):
    """A span that becomes the same entries as another request's."""

    position: int
    req: Any
    plan: Plan
    first: Any  # the request that is compressed
    segment_ids: array  # of the compressed segment


class Reserved(NamedTuple):
    """A span that is about to be compressed."""

    position: int
    req: Any
    plan: Plan
    slots: torch.Tensor | None  # [B] for the consolidated entries; None: there was no room on this rank
    outcome: Outcome  # so far


class SchedulerCompressor:
    """One per scheduler process.

    Args:
        scheduler: SGLang's, fully constructed.
        config: the server's settings.
        adapter: of this SGLang.

    Raises:
        ValueError: the model, its pool or the trained compressor cannot be served.
    """

    def __init__(self, scheduler, config: MetaSoftConfig, adapter: Adapter) -> None:
        self.scheduler = scheduler
        self.config = config
        self.adapter = adapter
        self.runner = scheduler.tp_worker.model_runner
        self.committer = Committer(scheduler.tree_cache, adapter)
        self.page_size = scheduler.page_size
        self.shape = model_shape(scheduler.model_config)
        model = examine(scheduler, adapter, self.committer, self.shape, config.kernels)
        self.sliding_window_tokens = longest_window(model.layers)
        reporter = scheduler.metrics_reporter
        has_metrics = reporter.current_scheduler_metrics_enabled
        self.metrics = Metrics(reporter.metrics_collector.labels) if has_metrics else None
        self.ranks, self.fence = Ranks(), LaunchFence(scheduler)
        self.stages = ProbeRunner(scheduler, config, adapter, self.committer, self.shape, model, self.metrics)
        method, self.config = self.stages.method, self.stages.config
        # The settings as given: where a compressor lies may differ from node to node.
        settings_id = f"{config.describe()} {method.identity} {method.consolidation_name}"
        self.namespaces = Namespaces(adapter, settings_id)
        if self.metrics is not None:
            self.metrics.compressor_served(self.stages.served.kind, self.config.method)
        self.fidelity = FidelitySampler(
            scheduler, adapter, self.committer, model.body,
            config.fidelity_sample if self.metrics is not None else 0.0,
            config.secret, config.kernels, self.stages.embedding, self._observe_fidelity,
        )  # fmt: skip
        self.matcher = PrefixMatcher(config, adapter, scheduler.tree_cache, self.namespaces)
        with self.fence.compression():
            self.stages.warm_up()
        logger.info(
            "MetaSoft is active: %s; %s; %s; %s; runs on %s",
            method.description, self.stages.served.origin, self.config.describe(), self.stages.memory,
            self.stages.kernels.description,
        )  # fmt: skip

    def weights_changed(self) -> None:
        """Drop what was computed with the old weights; the method follows them when it is next needed."""
        self.namespaces.generation += 1
        self.tree_cache.prefixes.clear()
        self.stages.is_stale = True

    def compress_finished(self, batch) -> None:
        """Compress the requests of a just launched batch whose prefill it completes.

        Called right after the forward was launched: nothing here waits for the device. Requests that cannot be
        compressed stay raw, with the reason on their state.
        """
        left_raw: set[int] = set()
        # A prompt may hold several spans: a shared document, then what follows it.
        while chosen := self._choose(batch, left_raw):
            first, twins = self._pair(chosen)
            left_raw |= self._compress(batch, first)
            self._adopt(batch, twins)

    def _compress(self, batch, chosen: list[Chosen]) -> set[int]:
        """Compress one span of each chosen request.

        Returns:
            Whose spans stayed raw, by ``id``: not to be tried again after this forward.
        """
        scheduler = self.scheduler
        if scheduler.enable_overlap:
            # The forward still reads the rows that the steps below change.
            scheduler.schedule_stream.wait_stream(scheduler.forward_stream)
        if reason := self._weights_unfit():
            return {self._leave_raw(item.req, reason) for item in chosen}
        reserved = [self._reserve(item) for item in chosen]
        left_raw: set[int] = set()
        if self.ranks.size == 1:
            left_raw = {self._leave_raw(item.req, item.outcome.bypass) for item in reserved if item.slots is None}
            reserved = [item for item in reserved if item.slots is not None]
        if not reserved:
            return left_raw
        own = self._run_stages(reserved)
        agreed = self.ranks.agree(own)
        self._sample_fidelity(reserved, agreed)
        shrink = [0] * len(batch.reqs)
        for (position, req, plan, slots, _), mine, outcome in zip(reserved, own, agreed, strict=True):
            if outcome is Outcome.SOUND:
                self._commit(req, plan, slots)
                shrink[position] = plan.saved_slots
                continue
            if outcome < mine:
                logger.error("MetaSoft: request %s stays as it is: another rank could not compress it", shown(req.rid))
                self._count_fault("other_rank")
            if slots is not None:
                self.committer.release(slots)
            left_raw.add(self._leave_raw(req, outcome.bypass))
        self._shrink_batch(batch, shrink)
        # SGLang keeps admission shut, once it was full, until a request leaves; here slots came free without one.
        scheduler.running_batch.batch_is_full = False
        return left_raw

    def _pair(self, chosen: list[Chosen]) -> tuple[list[Chosen], list[Twin]]:
        """Part the spans into those to compress and those that become the same entries as one of them.

        Such are equal prompts, and the same document up to a boundary.
        """
        if len(chosen) == 1:
            return chosen, []
        first: dict[bytes, Any] = {}
        rest, twins = [], []
        for item in chosen:
            ids = self._extend_prefix(item.req, item.plan).segment_ids
            if item.req.skip_radix_cache_insert or first.setdefault(ids.tobytes(), item.req) is item.req:
                rest.append(item)
            else:
                twins.append(Twin(*item, first[ids.tobytes()], ids))
        return rest, twins

    def _adopt(self, batch, twins: list[Twin]) -> None:
        """Put each twin onto the entries that its first has left in the tree; without them it is chosen again."""
        shrink = [0] * len(batch.reqs)
        for position, req, plan, first, ids in twins:
            prefix = first.metasoft.compressed
            if prefix is not None and prefix.segment_ids == ids:
                slots = self.committer.row(first)[plan.start_slots : plan.start_slots + plan.kept_slots]
                self._commit(req, plan, slots.to(torch.int64), is_adopted=True)
                shrink[position] = plan.saved_slots
        if any(shrink):
            self._shrink_batch(batch, shrink)

    def _reserve(self, item: Chosen) -> Reserved:
        outcome = Outcome.NO_FREE_SLOTS
        try:
            slots = self.committer.reserve(item.plan.kept_slots)
        except Exception as error:
            slots, outcome = None, Outcome.FAULT
            self._report_fault(error, "reserve")
        return Reserved(*item, slots, Outcome.SOUND if slots is not None else outcome)

    def _weights_unfit(self) -> Bypass | None:
        """Why nothing can be compressed with the present weights, or None."""
        if self.stages.is_stale:
            try:
                with self.fence.compression():
                    self.stages.follow_weights()
            except Exception as error:
                if self.ranks.size > 1:  # which the others may not share
                    raise
                self._report_fault(error, "weights")
                return Bypass.FAULT
        return Bypass.WEIGHTS if self.stages.unfit else None

    def _run_stages(self, reserved: list[Reserved]) -> list[Outcome]:
        """Run the stages of all requests; returns this rank's outcomes.

        Raises:
            Exception: of several ranks this one alone may have failed, while the others wait for it: nothing but the
                end of the server is left.
        """
        scheduler = self.scheduler
        # A rank without room takes part in what the ranks do together; its entries go where SGLang's padding goes.
        slots = [
            torch.zeros(item.plan.kept_slots, dtype=torch.int64, device=self.stages.device)
            if item.slots is None
            else item.slots
            for item in reserved
        ]
        items = [(item.req, item.plan, into) for item, into in zip(reserved, slots, strict=True)]
        try:
            with self.fence.compression():
                is_sound = self.stages.run(items)
        except Exception as error:
            if self.ranks.size > 1 and not isinstance(error, InStepFault):
                logger.critical(
                    "MetaSoft: a fault outside of the stages, in which the ranks cannot agree: the server ends"
                )
                raise
            cause = error.__cause__ if isinstance(error, InStepFault) else error
            self._report_fault(cause, self.stages.failed_stage, len(reserved))
            return [min(item.outcome, Outcome.FAULT) for item in reserved]
        finally:
            if scheduler.enable_overlap:
                # Made on this stream, read on the other, after a fault too: must outlive what is queued there.
                scheduler.batch_record_buf[scheduler.batch_record_ct].append(slots)
                scheduler.schedule_stream.wait_stream(scheduler.forward_stream)
        for item, sound in zip(reserved, is_sound, strict=True):
            if not sound:
                logger.error(
                    "MetaSoft: compression failed, numbers are not finite; request %s stays as it is",
                    shown(item.req.rid),
                )
                self._count_fault("not_finite")
        return [
            min(item.outcome, Outcome.SOUND if sound else Outcome.NOT_FINITE)
            for item, sound in zip(reserved, is_sound, strict=True)
        ]

    def _sample_fidelity(self, reserved: list[Reserved], outcomes: list[Outcome]) -> None:
        """Compare both forms of the sampled prompts, before the raw one is let go."""
        spans = [
            (item.req, item.plan, item.slots)
            for item, outcome in zip(reserved, outcomes, strict=True)
            if outcome is Outcome.SOUND and self._is_last_chunk(item.req) and self.fidelity.wants(item.req.rid)
        ]
        if not spans:
            return
        try:
            with self.fence.compression():
                self.fidelity.compare(spans)
        except Exception as error:
            if self.ranks.size > 1:  # the others may wait in the model's collectives
                logger.critical("MetaSoft: a fault while fidelity was sampled, in which the ranks cannot agree")
                raise
            logger.error("MetaSoft: fidelity could not be sampled", exc_info=error)
            self._count_fault("fidelity")
        finally:
            if self.scheduler.enable_overlap:
                self.scheduler.schedule_stream.wait_stream(self.scheduler.forward_stream)

    def _observe_fidelity(self, kl_nats: float) -> None:
        if self.metrics is not None:
            self.metrics.fidelity_sampled(kl_nats)

    def _choose(self, batch, left_raw: set[int]) -> list[Chosen]:
        decoding = {id(req) for req in batch.decoding_reqs or ()}
        chosen = []
        for position, req in enumerate(batch.reqs):
            state: RequestState | None = getattr(req, "metasoft", None)
            if state is None or state.plan is None or id(req) in decoding or id(req) in left_raw or req.finished():
                continue
            is_last_chunk = self._is_last_chunk(req)
            if is_last_chunk:
                state.make_plan(self.config, self.page_size)
            elif self.config.during_prefill:
                state.make_plan(self.config, self.page_size, state.offset + self.adapter.extend_end(req))
            else:
                continue
            plan = state.plan
            if plan is not None and plan.end_slots >= self.adapter.protected_len(req):
                chosen.append(Chosen(position, req, plan))
            elif plan is not None:
                self._leave_raw(req, Bypass.SHARED_WINDOW)
            elif not is_last_chunk:
                state.make_plan(self.config, self.page_size)  # too little yet; the plan for the whole prompt stands
        return chosen

    def _report_fault(self, error: BaseException | None, stage: str, requests: int = 1) -> None:
        logger.error("MetaSoft: compression failed, %d requests stay uncompressed", requests, exc_info=error)
        for _ in range(requests):
            self._count_fault(stage)

    def _count_fault(self, stage: str) -> None:
        if self.metrics is not None:
            self.metrics.fault(stage)

    def update_gauges(self, running) -> None:
        """Bring the metrics that show a present state up to date; ``running`` are the requests that decode."""
        if self.metrics is not None:
            self.metrics.update_gauges(running, self.tree_cache.prefixes)
        if self.stages.clock is not None:
            self.stages.clock.collect()
        self.fidelity.collect()

    def state(self) -> dict:
        """What ``/server_info`` shows: method, compressor, settings, size of the index."""
        index = self.tree_cache.prefixes
        settings = {name: getattr(self.config, name) for name in settings_of()}
        return settings | {
            "active": self.stages.method.description,
            "compressor": self.stages.served.state,
            "runs_on": self.stages.kernels.description,
            "weights": self.stages.unfit or "fit",
            "index_prefixes": len(index),
            "index_tokens_now": index.num_tokens,
        }

    def _is_last_chunk(self, req) -> bool:
        """Whether the last extend completed the request's prefill."""
        return self.adapter.extend_end(req) == len(req.full_untruncated_fill_ids)

    def _leave_raw(self, req, reason: Bypass) -> int:
        """Leave a request's span as it is; after a chunk that is not the last, the next one tries again.

        Returns:
            The request's ``id``.
        """
        state: RequestState = req.metasoft
        if self._is_last_chunk(req):
            state.set_bypass(reason, BypassLifetime.SCHEDULE)
        else:
            state.set_bypass(reason, BypassLifetime.CHUNK)
            state.make_plan(self.config, self.page_size)
        return id(req)

    def _commit(self, req, plan: Plan, slots: torch.Tensor, is_adopted: bool = False) -> None:
        state: RequestState = req.metasoft
        prefix = self._extend_prefix(req, plan)
        compact_ids = state.set_compressed(req, prefix)
        is_last_chunk = self._is_last_chunk(req)
        state.make_plan(self.config, self.page_size)
        next_plan, state.plan = state.plan, None  # the insertion inside commit is of the prefix, not a raw prefix
        is_last_span = is_last_chunk and next_plan is None
        self.committer.commit(req, plan, slots, compact_ids, self.config.keep_raw, is_last_span, is_adopted)
        state.plan = next_plan
        if self.metrics is not None and not is_adopted:
            self.metrics.span_compressed(plan)
        if state.generation == self.namespaces.generation and not req.skip_radix_cache_insert:
            index, tenant = self.tree_cache.prefixes, self.namespaces.tenant(req)
            index.add(tenant, self.namespaces.namespace(req), prefix, state.logical_ids(req))
            if is_last_chunk:
                index.remember_prompt(tenant, state.prompt_ids)

    def _extend_prefix(self, req, plan: Plan) -> CompressedPrefix:
        state: RequestState = req.metasoft
        start = state.compressed_tokens
        end = start + plan.span_tokens
        probed = state.probed_tokens(plan, self.adapter.extend_end(req))
        ids = state.logical_ids(req)
        new_ids = make_virtual_ids(
            self.config.secret, self.namespaces.namespace(req), state.compressed, ids[start:end], ids[end:probed],
            plan.kept_slots,
        )  # fmt: skip
        return CompressedPrefix.extend(state.compressed, new_ids, end, probed)

    def _shrink_batch(self, batch, shrink: list[int]) -> None:
        """Give the batch its new lengths; new tensors, because the launched forward still uses the old ones."""
        host = torch.tensor(shrink, dtype=torch.int64)[self.adapter.request_of_rows(batch)]
        batch.seq_lens = batch.seq_lens - to_device(host, torch.int64, batch.seq_lens.device)
        batch.seq_lens_cpu = batch.seq_lens_cpu - host
        batch.seq_lens_sum = int(batch.seq_lens_cpu.sum())

    @property
    def tree_cache(self):
        return self.committer.tree_cache
