"""Runs the stages of a compression for the requests of a batch: from their plans to entries in new slots."""

import contextlib
import hashlib
import itertools
import logging
import re
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from sglang.srt.runtime_context import get_parallel

from metasoft_patches.adapter import Adapter
from metasoft_patches.cache.commit import Committer
from metasoft_patches.cache.request import RequestState
from metasoft_patches.forward import lora
from metasoft_patches.forward.body import attention_modules
from metasoft_patches.forward.embedding import SharedEmbedding
from metasoft_patches.forward.kernels import choose_kernels
from metasoft_patches.forward.probe import ProbeBackend, run_probe, visit_layers
from metasoft_patches.forward.served_model import Served, SGLangModel
from metasoft_patches.metrics import Metrics
from metasoft_patches.scheduler.ranks import Guard, first_ranks_choice
from metasoft_patches.transfer import to_device
from sglang_metasoft.config import MetaSoftConfig
from sglang_metasoft.consolidations import Consolidation
from sglang_metasoft.methods.auto import serve
from sglang_metasoft.pipeline.batch import make_batch
from sglang_metasoft.pipeline.clock import StageClock, no_clock
from sglang_metasoft.pipeline.memory import LIST_BYTES, batch_bytes, prompts_together
from sglang_metasoft.pipeline.probe import make_probe
from sglang_metasoft.pipeline.warm_up import warm_up
from sglang_metasoft.types import Job, LayerPool, ModelShape, Plan, Probe, Prompt

logger = logging.getLogger(__name__)

RID_CHARS = 150  # of a request's id in a trace's file name


class ProbeRunner:
    """One per scheduler process.

    Args:
        scheduler: SGLang's, fully constructed.
        config: the server's settings; :attr:`config` has what they came to.
        adapter: of this SGLang.
        committer: bound to the scheduler's pools.
        shape: of the served model.
        model: what start-up has found out about it.
        metrics: None measures nothing.

    Raises:
        ValueError: the method or the kernels cannot serve this model.
    """

    def __init__(
        self, scheduler, config: MetaSoftConfig, adapter: Adapter, committer: Committer, shape: ModelShape,
        model: Served, metrics: Metrics | None,
    ) -> None:  # fmt: skip
        self.scheduler, self.adapter, self.model = scheduler, adapter, model
        self.committer, self.shape = committer, shape
        self.runner = scheduler.tp_worker.model_runner
        self.device = torch.device(self.runner.device)
        self.rank, self.size = get_parallel().attn_tp_rank, get_parallel().attn_tp_size
        self.first_kv_head = self.rank * shape.num_kv_heads // self.size
        self.embedding = SharedEmbedding(self._embed, shape.hidden_size)
        self.served = serve(config, shape, self.embedding, self.device, self._model_under(), first_ranks_choice)
        self.method = self.served.method
        self.config = config = self.method.config  # names the method and the compressor that were found
        for warning in self.served.warnings if self.rank == 0 else ():
            logger.warning("%s", warning)
        self.adapter_consolidations = lora.AdapterConsolidations(self.runner, self._prepare_for)
        self.is_stale = False  # the weights have changed since
        self.unfit: str | None = None  # why the method cannot serve the present weights
        self.has_probe = self.method.runs_model
        self.kernels = choose_kernels(
            config, self.method, shape.num_heads // self.size, max(shape.num_kv_heads // self.size, 1),
            self.runner.dtype, committer.pool.dtype,
        )  # fmt: skip
        self.clock = StageClock(self.device, metrics.stage_timed) if metrics is not None else None

    def warm_up(self) -> None:
        """Compile what prompts are going to run, on a GPU; on all ranks at the same time, on the forward stream.

        A fault is logged: the server starts all the same, and a prompt that meets it again stays as it is.
        """
        if self.device.type != "cuda" or self.kernels.attend is None:
            return
        layers = attention_modules(self.runner.model)
        pools = self.committer.req_to_token_pool, self.committer.pool
        backend = ProbeBackend(self.runner.model, *pools, [], lambda *args: args[2])
        kinds = {pool.window_tokens: pool for pool in map(backend.layer_pool, layers)}
        try:
            seconds = sum(
                warm_up(self.method, self.kernels.attend, pool, layers[0].tp_q_head_num, self.runner.dtype)
                for pool in kinds.values()
            )
        except Exception as error:
            logger.error("MetaSoft: the kernels could not be compiled before the first prompt", exc_info=error)
        else:
            logger.info("MetaSoft: kernels compiled and workspace taken in %.1f s", seconds)

    @property
    def memory(self) -> str:
        """What a compression takes beside the pool, for the start-up line."""
        if not self.kernels.workspace_bytes:
            return "workspace not bounded"
        return f"workspace at most {self.kernels.workspace_bytes // 2**20} MiB and {LIST_BYTES} bytes a token"

    def follow_weights(self) -> None:
        """Bring the method in line with changed weights: on all ranks at the same time, on the forward stream.

        Once for an update however many parts it came in, since it is called when the next prompt is to be compressed.
        Weights that a trained compressor does not fit are noted in ``unfit``.
        """
        began = time.perf_counter()
        try:
            self.method = self.method.follow_weights(self._model_under())
        except ValueError as error:
            self.unfit = str(error)
            logger.error("MetaSoft: no prompt is compressed until the weights are updated again: %s", error)
        else:
            seconds = time.perf_counter() - began
            logger.info("MetaSoft: %s follows the updated weights (%.2f s)", self.config.method, seconds)
            if self.unfit is not None:
                logger.warning("MetaSoft: the weights fit again: prompts are compressed")
            self.unfit = None
            self.adapter_consolidations = lora.AdapterConsolidations(self.runner, self._prepare_for)
        self.is_stale = False

    @property
    def failed_stage(self) -> str:
        """Where :meth:`run` was when it raised; a fault outside of a layer is the probe's."""
        return self.clock and self.clock.unfinished or "probe"

    def _prepare_for(self, lora_id: str) -> Consolidation:
        return self.method.consolidation.prepared_for(self._model_under(lora_id))

    def _model_under(self, lora_id: str | None = None) -> SGLangModel:
        return SGLangModel(self.scheduler, self.adapter, self.model, self._embed, lora_id)

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.model.body.table(ids)

    def run(self, items: list[tuple[object, Plan, torch.Tensor]]) -> list[bool]:
        """Probe, score, route, merge and write the new slots of all items; runs on the forward stream.

        Returns:
            For each item whether its entries may be committed. Only a CPU says no: any other device would have to be
            waited for. There the stages themselves make harmless what is not finite.

        Raises:
            InStepFault: a stage failed on this rank of several, which took part in the whole probe all the same.
        """
        guard = Guard(is_shared=self.size > 1)
        if self.clock is not None:
            self.clock.drop()  # what a compression that failed has left
        for req, _, _ in items:
            self._consolidation_of(req)  # may run the model, on all ranks: before one of them alone can fail
        jobs = [self._make_job_in_step(guard, *item) for item in items]
        trace: list[list] | None = [[] for _ in jobs] if self.config.trace_dir else None
        finite: list[list[torch.Tensor]] = [[] for _ in jobs]
        for some in self._together(jobs):
            rows = [self.adapter.row_index(req) for req, _, _ in items[some]]
            self._run_together(guard, jobs[some], rows, finite[some], trace and trace[some])
        guard.check()
        with guard():
            if self.clock is not None:
                self.clock.finish()
            if trace is not None:
                for (req, plan, _), layers in zip(items, trace, strict=True):
                    self._write_trace(req, plan, layers)
        guard.check()
        return [all(flags) for flags in finite] if self.device.type == "cpu" else [True] * len(jobs)

    def _together(self, jobs: list[Job]) -> list[slice]:
        """Which jobs share a probe and its stages: all, unless that takes more than the workspace.

        By lengths alone, so that all ranks do the same.
        """
        if self.kernels.attend is None:
            return [slice(0, len(jobs))]
        heads = self.shape.num_heads // self.size
        groups = max(self.shape.num_kv_heads // self.size, 1)

        def bytes_of(some: slice) -> int:
            plans, probes = [job.plan for job in jobs[some]], [job.probe for job in jobs[some]]
            return batch_bytes(
                [probe.embeds.shape[0] for probe in probes], [probe.context_slots for probe in probes],
                [(plan.span_tokens, plan.kept_slots) for plan in plans], heads, groups, self.shape.head_dim,
            )  # fmt: skip

        return prompts_together(len(jobs), bytes_of)

    def _run_together(
        self, guard: Guard, jobs: list[Job], rows: list[int], finite: list[list[torch.Tensor]], trace: list | None
    ) -> None:
        """One probe for these jobs, and the stages layer by layer; ``finite`` and ``trace`` are theirs to add to."""
        clock = self.clock or no_clock
        batch: Any = None  # of either kind; no layer is compressed before it is made
        with guard():
            if guard.error is None:
                batch = make_batch(jobs, self.method, self.kernels.attend, self.first_kv_head)

        def on_layer(number, layer, q, k, v, pool):
            if guard.error is None:
                with guard():
                    return compress(number, layer, q, k, v, pool)
            return q.new_zeros(*q.shape[:2], layer.v_head_dim)

        def compress(number, layer, q, k, v, pool):
            gate_scale = self.method.gate_scale(number, self.first_kv_head, layer.tp_k_head_num)
            out, entries, flags = batch.compress(q, k, v, pool, gate_scale, number, clock)
            for of_job, flag in zip(finite, flags, strict=False):  # none but on a CPU
                of_job.append(flag)
            with clock("write"):
                self.committer.write(layer, pool, batch, entries)
            if trace is not None:
                for job, of_job, kept in zip(jobs, trace, batch.kept_of_jobs(entries), strict=True):
                    of_job.append((kept.cpu(), *read_entries(pool, job.new_slots, q.dtype)))
            return out

        pools = self.committer.req_to_token_pool, self.committer.pool
        backend = ProbeBackend(self.runner.model, *pools, jobs, on_layer)
        if self.has_probe:
            try:
                run_probe(
                    self.runner, self.model.body, backend, to_device(rows, torch.int64, self.device), self.adapter
                )
            finally:
                lora.hold_back_loads(self.scheduler)
        else:
            visit_layers(self.runner, backend)

    def _make_job_in_step(self, guard: Guard, req, plan: Plan, slots: torch.Tensor) -> Job:
        """The job; or, if this rank of several cannot make it, one of its shapes, with which it joins in the probe."""
        self.embedding.calls = 0
        with guard():
            return self._make_job(req, plan, slots)
        if self.embedding.is_inside:
            raise guard.error  # nobody knows who has taken part in that call
        tokens, job = self.embedding.rehearse(lambda: self._make_job(req, plan, slots))
        for count in tokens[self.embedding.calls :]:
            self.embedding(torch.zeros(count, dtype=torch.int64, device=self.device))
        embeds = torch.zeros(job.probe.embeds.shape, device=self.device)
        probe = job.probe._replace(embeds=embeds, consolidation_inputs=None)
        return job._replace(probe=probe, context_slots=slots, span_slots=slots, new_slots=slots)

    def _consolidation_of(self, req) -> Consolidation:
        """The one that is prepared for the adapter that the request runs under."""
        consolidation = self.method.consolidation
        has_own = consolidation.learns_from_model and req.lora_id is not None
        return self.adapter_consolidations.of(req.lora_id) if has_own else consolidation

    def _ids(self, ids) -> torch.Tensor:
        if self.embedding.is_rehearsal:
            return torch.empty(len(ids), dtype=torch.int64, device=self.device)
        return to_device(ids, torch.int64, self.device)

    def _make_job(self, req, plan: Plan, slots: torch.Tensor) -> Job:
        state: RequestState = req.metasoft
        compressed_tokens = state.compressed_tokens
        span_end = compressed_tokens + plan.span_tokens
        context_tokens = state.probed_tokens(plan, self.adapter.extend_end(req))
        context_slots = context_tokens - state.offset
        ids = state.logical_ids(req)
        if self.has_probe:
            prompt = Prompt(
                span_ids=self._ids(ids[compressed_tokens:span_end]),
                tail_ids=self._ids(ids[span_end:context_tokens]),
                context_slots=context_slots,
                context_tokens=context_tokens,
            )
            probe = make_probe(self.method, prompt, self._consolidation_of(req))
        else:
            probe = Probe(torch.empty(0, self.shape.hidden_size), context_slots, context_tokens)
        row = self.committer.row(req)
        return Job(
            plan=plan,
            probe=probe,
            context_slots=row[: probe.context_slots].to(torch.int64),
            span_slots=row[plan.start_slots : plan.end_slots].to(torch.int64),
            new_slots=slots,
            lora_id=req.lora_id,
        )

    def _write_trace(self, req, plan: Plan, layers: list) -> None:
        folder = Path(self.config.trace_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        kept, keys, values = (torch.stack(tensors) for tensors in zip(*layers, strict=True))
        tensors = {"kept": kept, "key": keys, "value": values, "plan": torch.tensor(plan)}
        save_file(tensors, claim_file(folder, f"{file_stem(req.rid)}-{plan.start_slots}-rank{self.rank}"))


def claim_file(folder: Path, stem: str) -> Path:
    """A new, empty file for a trace: numbered if there is one of that name, as requests may have the same id."""
    for number in itertools.count(1):
        path = folder / f"{stem}{'' if number == 1 else f'.{number}'}.safetensors"
        with contextlib.suppress(FileExistsError):
            path.touch(exist_ok=False)
            break
    return path


def file_stem(rid: str) -> str:
    """A file name's start for a request's id, which a client may choose: another one for every id, and not too long."""
    stem = re.sub(r"[^A-Za-z0-9_-]", "_", rid)[:RID_CHARS]
    return stem if stem == rid else f"{stem}.{hashlib.sha256(rid.encode(errors='surrogatepass')).hexdigest()[:16]}"


def read_entries(pool: LayerPool, slots: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V at these slots, ``[B, G, d]`` on the host: for traces."""
    scaled = ((pool.key, pool.key_scale), (pool.value, pool.value_scale))
    return tuple((buffer[slots].to(dtype) * scale).cpu() for buffer, scale in scaled)
