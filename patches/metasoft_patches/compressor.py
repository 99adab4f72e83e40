"""Compression inside one scheduler process: picks requests after a prefill, runs the stages, commits the result."""

import contextlib
import logging
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from sglang.srt.runtime_context import get_parallel

from metasoft_patches.admission import bypass_reason
from metasoft_patches.metrics import Metrics
from metasoft_patches.model import check_model, model_shape
from metasoft_patches.probe_forward import ProbeBackend, run_probe, visit_layers
from metasoft_patches.request import RequestState
from metasoft_patches.served_model import LoadedModel
from metasoft_patches.transfer import to_device
from sglang_metasoft.adapter import Adapter
from sglang_metasoft.chains import Chain, make_virtual_ids
from sglang_metasoft.commit import Committer
from sglang_metasoft.config import MetaSoftConfig
from sglang_metasoft.merge import load_consolidation
from sglang_metasoft.pipeline import compress_layer
from sglang_metasoft.score import load_method
from sglang_metasoft.types import Bypass, Job, Plan, Probe, Prompt

logger = logging.getLogger(__name__)

# Chains of one prompt that are tried against the tree; more exist only where prompts nearly repeat each other.
MAX_CANDIDATES = 3


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
        check_model(self.runner.model, self.committer.pool, self.shape)
        self.method = self._load_method()
        consolidation = load_consolidation(config.consolidation or self.method.default_consolidation)
        self.has_probe = self.method.needs_probe or consolidation.needs_probe
        rank, size = get_parallel().attn_tp_rank, get_parallel().attn_tp_size
        self.first_kv_head = rank * self.shape.num_kv_heads // size
        self.trace_rank = rank
        # Compressions under other settings are other content.
        self.settings_id = f"{config.describe()} {self.method.identity}"
        self.generation = 0
        reporter = scheduler.metrics_reporter
        has_metrics = reporter.current_scheduler_metrics_enabled
        self.metrics = Metrics(reporter.metrics_collector.labels) if has_metrics else None
        logger.info("MetaSoft is active: %s; %s", self.method.description, config.describe())

    def weights_changed(self) -> None:
        """Drop what was computed with the old weights: chains, and soft tokens drawn from the embedding table."""
        self.generation += 1
        self.tree_cache.chains.clear()
        self.method = self._load_method()

    def _load_method(self):
        device = torch.device(self.runner.device)
        method = load_method(self.config.method)(self.config, self.shape, self._embed, device)
        method.prepare(LoadedModel(self.scheduler, self.adapter, self._embed))
        return method

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.runner.model.model.embed_tokens(ids)

    # -- per batch ---------------------------------------------------------------------------------------------

    def compress_finished(self, batch) -> None:
        """Compress the requests of a just launched batch whose prefill it completes.

        Called right after the forward was launched: nothing here waits for the device. Requests that cannot be
        compressed stay raw, with the reason on their state.
        """
        done: set[int] = set()
        # A prompt may hold several spans: a shared document, then what follows it.
        while chosen := self._choose(batch, done):
            self._compress(batch, chosen, done)

    def _compress(self, batch, chosen: list[tuple[int, object, Plan]], done: set[int]) -> None:
        """Compress one span of each chosen request; adds to ``done`` who must not be tried again after this forward."""
        scheduler = self.scheduler
        overlap = scheduler.enable_overlap
        if overlap:
            # The forward still reads the rows that the steps below change.
            scheduler.schedule_stream.wait_stream(scheduler.forward_stream)
        reserved = []
        for position, req, plan in chosen:
            slots = self.committer.reserve(plan.kept_slots)
            if slots is None:
                self._skip(req, Bypass.NO_FREE_SLOTS, done)
            else:
                reserved.append((position, req, plan, slots))
        if not reserved:
            return
        try:
            with scheduler.forward_stream_ctx if overlap else contextlib.nullcontext():
                if overlap:
                    scheduler.forward_stream.wait_stream(scheduler.schedule_stream)
                is_sound = self._run([(req, plan, slots) for _, req, plan, slots in reserved])
        except Exception:
            logger.exception("MetaSoft: compression failed, %d requests stay uncompressed", len(reserved))
            for _, req, _, slots in reserved:
                self.committer.give_back(slots)
                self._skip(req, Bypass.FAULT, done)
            return
        if overlap:
            # Made on this stream, read on the other: must outlive the forward.
            scheduler.batch_record_buf[scheduler.batch_record_ct].append([slots for *_, slots in reserved])
            scheduler.schedule_stream.wait_stream(scheduler.forward_stream)
        shrink = [0] * len(batch.reqs)
        for (position, req, plan, slots), sound in zip(reserved, is_sound, strict=True):
            if not sound:
                logger.error("MetaSoft: compression failed, numbers are not finite; request %s stays as it is", req.rid)
                self.committer.give_back(slots)
                self._skip(req, Bypass.FAULT, done)
                continue
            self._commit(req, plan, slots)
            shrink[position] = plan.saved_slots
        self._shrink_batch(batch, shrink)
        # SGLang keeps admission shut, once it was full, until a request leaves; here slots came free without one.
        scheduler.running_batch.batch_is_full = False

    def _choose(self, batch, done: set[int]) -> list[tuple[int, object, Plan]]:
        decoding = {id(req) for req in batch.decoding_reqs or ()}
        chosen = []
        for position, req in enumerate(batch.reqs):
            state: RequestState | None = getattr(req, "metasoft", None)
            if state is None or state.plan is None or id(req) in decoding or id(req) in done or req.finished():
                continue
            is_last_chunk = self._is_last_chunk(req)
            if is_last_chunk:
                if self.adapter.finishes_next(req):
                    self._skip(req, Bypass.FINISHES_NOW, done)
                    continue
                state.make_plan(self.config, self.page_size)
            elif self.config.during_prefill:
                state.make_plan(self.config, self.page_size, state.offset + self.adapter.extend_end(req))
            else:
                continue
            plan = state.plan
            if plan is not None and plan.end_slots >= self.adapter.protected_len(req):
                chosen.append((position, req, plan))
            elif plan is not None:
                self._skip(req, Bypass.SHARED_WINDOW, done)
            elif not is_last_chunk:
                state.make_plan(self.config, self.page_size)  # too little yet; the plan for the whole prompt stands
        return chosen

    def _is_last_chunk(self, req) -> bool:
        """Whether the last extend completed the request's prefill."""
        return self.adapter.extend_end(req) == len(req.full_untruncated_fill_ids)

    def _skip(self, req, reason: Bypass, done: set[int]) -> None:
        """Leave a request's span as it is; after a chunk that is not the last, the next one tries again."""
        done.add(id(req))
        state: RequestState = req.metasoft
        if self._is_last_chunk(req):
            state.skip(reason)
        else:
            state.failure = reason
            state.make_plan(self.config, self.page_size)

    def _run(self, items: list[tuple[object, Plan, torch.Tensor]]) -> list[bool]:
        """Probe, score, route, merge and write the new slots of all items; runs on the forward stream.

        Returns:
            For each item whether its entries may be committed. Only a lone CPU process says no: any other device would
            have to be waited for, and of several ranks, each with heads of its own, all must do the same. There the
            stages themselves make harmless what is not finite.
        """
        jobs = [self._make_job(req, plan, slots) for req, plan, slots in items]
        trace = [[] for _ in jobs] if self.config.trace_dir else None
        order = {id(job): number for number, job in enumerate(jobs)}
        finite = [[] for _ in jobs]

        def on_layer(job, layer, q, k, v, pool):
            gate_scale = self.method.gate_scale(layer.layer_id, self.first_kv_head, layer.tp_k_head_num)
            out, routes, merged, is_finite = compress_layer(
                job, q, k, v, pool, self.method, self.config, gate_scale, layer.layer_id, self.first_kv_head
            )
            finite[order[id(job)]].append(is_finite)
            if trace is not None:
                trace[order[id(job)]].append((routes.kept.cpu(), merged.key.cpu().clone(), merged.value.cpu().clone()))
            self.committer.write(layer, job.new_slots, merged)
            return out

        backend = ProbeBackend(self.committer.req_to_token_pool, self.committer.pool, jobs, on_layer)
        rows = to_device([self.adapter.row_index(req) for req, _, _ in items], torch.int64, self.runner.device)
        if self.has_probe:
            run_probe(self.runner, backend, rows, self.adapter)
        else:
            visit_layers(self.runner, backend)
        if trace is not None:
            for (req, plan, _), layers in zip(items, trace, strict=True):
                self._write_trace(req, plan, layers)
        if torch.device(self.runner.device).type != "cpu" or get_parallel().attn_tp_size > 1:
            return [True] * len(jobs)
        return [all(flags) for flags in finite]

    def _make_job(self, req, plan: Plan, slots: torch.Tensor) -> Job:
        state: RequestState = req.metasoft
        chain_tokens = state.chain.tokens if state.chain else 0
        span_end = chain_tokens + plan.span_tokens
        context_slots = self.adapter.extend_end(req)
        context_tokens = state.offset + context_slots
        if plan.ends_at_boundary:
            context_slots, context_tokens = plan.end_slots, span_end
        # Outputs of a retracted request come after the prompt; they are part of the tail.
        ids = state.raw_ids + req.output_ids
        if self.has_probe:
            probe = self.method.probe(
                Prompt(
                    span_ids=to_device(ids[chain_tokens:span_end], torch.int64, self.runner.device),
                    tail_ids=to_device(ids[span_end:context_tokens], torch.int64, self.runner.device),
                    context_slots=context_slots,
                    context_tokens=context_tokens,
                )
            )
        else:
            probe = Probe(torch.empty(0, self.shape.hidden_size), context_slots, context_tokens)
        row = self.committer.row(req)
        return Job(
            plan=plan,
            probe=probe,
            context_slots=row[: probe.context_slots].to(torch.int64),
            span_slots=row[plan.start_slots : plan.end_slots].to(torch.int64),
            new_slots=slots,
        )

    def _commit(self, req, plan: Plan, slots: torch.Tensor) -> None:
        state: RequestState = req.metasoft
        chain = self._extend_chain(req, plan)
        compact_ids = state.set_chain(req, chain)
        is_last_chunk = self._is_last_chunk(req)
        state.make_plan(self.config, self.page_size)
        next_plan, state.plan = state.plan, None  # the insertion inside commit is of the chain, not a raw prefix
        is_last_span = is_last_chunk and next_plan is None
        self.committer.commit(req, plan, slots, compact_ids, self.config.keep_raw, is_last_span)
        state.plan = next_plan
        if self.metrics is not None:
            self.metrics.span_compressed(plan)
        if state.generation == self.generation:
            index = self.tree_cache.chains
            index.add(self.namespace(req), chain, state.digests())
            if is_last_chunk:
                index.remember_prompt(self.tenant(req), state.digests())

    def _extend_chain(self, req, plan: Plan) -> Chain:
        state: RequestState = req.metasoft
        start = state.chain.tokens if state.chain else 0
        end = start + plan.span_tokens
        new_ids = make_virtual_ids(
            self.config.secret, self.namespace(req), state.chain, state.raw_ids[start:end], plan.kept_slots
        )
        before = state.chain.virtual_ids if state.chain else new_ids[:0]
        return Chain(raw_ids=state.raw_ids[:end], virtual_ids=before + new_ids)

    def _shrink_batch(self, batch, shrink: list[int]) -> None:
        """Give the batch its new lengths; new tensors, because the launched forward still uses the old ones."""
        host = torch.tensor(shrink, dtype=torch.int64)
        batch.seq_lens = batch.seq_lens - to_device(host, torch.int64, batch.seq_lens.device)
        batch.seq_lens_cpu = batch.seq_lens_cpu - host
        batch.seq_lens_sum = int(batch.seq_lens_cpu.sum())

    def _write_trace(self, req, plan: Plan, layers: list) -> None:
        folder = Path(self.config.trace_dir)
        folder.mkdir(parents=True, exist_ok=True)
        kept, keys, values = (torch.stack(tensors) for tensors in zip(*layers, strict=True))
        tensors = {"kept": kept, "key": keys, "value": values, "plan": torch.tensor(plan)}
        name = re.sub(r"[^A-Za-z0-9_-]", "_", req.rid)  # a client may choose its request's id
        save_file(tensors, folder / f"{name}-{plan.start_slots}-rank{self.trace_rank}.safetensors")

    # -- per request -------------------------------------------------------------------------------------------

    @property
    def tree_cache(self):
        return self.committer.tree_cache

    def tenant(self, req) -> tuple:
        """What separates raw prefixes: the client's own keys. LoRA requests are not compressed."""
        return self.adapter.tenant(req)

    def namespace(self, req) -> tuple:
        """What separates chains: tenant, settings, and the weights that the KV was computed with."""
        return (self.settings_id, req.metasoft.generation, *self.tenant(req), req.metasoft.namespace_options)

    def match_prefix(self, match, req, tree_cache, *args, takes_raw_prefix: bool = True, **kwargs) -> None:
        """Match a waiting request against the tree in the form, raw or compact, that leaves the least to compute.

        Args:
            match: SGLang's ``Req.init_next_round_input``.
            takes_raw_prefix: else nothing raw is taken from the tree.
        """
        state: RequestState = req.metasoft
        state.restart(req)
        state.takes_raw_prefix = takes_raw_prefix
        state.adopt_prompt(req)
        state.generation = self.generation
        state.refusal = state.refusal or bypass_reason(req, self.adapter)
        chains = []
        if state.refusal is None:
            found = tree_cache.chains.candidates(self.namespace(req), state.raw_ids, state.digests(), MAX_CANDIDATES)
            chains = [chain for chain in found if not _reads_logprobs_inside(req, chain)]

        seen = tree_cache.chains.seen_tokens(self.tenant(req), state.digests()) if state.refusal is None else 0

        def match_with(chain: Chain | None) -> int:
            """Match in compact form with this chain, or raw; returns the logical tokens matched, -1 if it is gone."""
            state.restore_raw(req)
            if chain is not None:
                state.use_chain(req, chain)
            state.plan = None  # which would cap the match at its span's end
            match(req, tree_cache, *args, **kwargs)
            matched_slots = self.adapter.prefix_len(req)
            if chain is not None and matched_slots < chain.slots:
                tree_cache.chains.discard(chain)  # evicted from the tree meanwhile
                return -1
            state.see_shared_head(matched_slots + state.offset, seen, self.page_size)
            state.make_plan(self.config, self.page_size)
            if state.plan is not None and matched_slots > state.plan.end_slots:
                match(req, tree_cache, *args, **kwargs)
            return self.adapter.prefix_len(req) + state.offset

        best, best_tokens, tried = None, -1, None
        for chain in (*chains, None):
            tried, tokens = chain, match_with(chain)
            if tokens > best_tokens:
                best, best_tokens = chain, tokens
            if tokens == len(state.raw_ids) + len(req.output_ids) - 1:
                break  # nothing can match more
        if tried is not best:
            match_with(best)
        if best is not None:
            tree_cache.chains.touch(best)


def _reads_logprobs_inside(req, chain: Chain) -> bool:
    return req.return_logprob and 0 <= req.logprob_start_len < chain.tokens
