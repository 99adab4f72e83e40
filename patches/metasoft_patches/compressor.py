"""Compression inside one scheduler process: picks requests after a prefill, runs the stages, commits the result."""

import contextlib
import logging
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.runtime_context import get_parallel

from metasoft_patches.probe_forward import ProbeBackend, run_probe
from metasoft_patches.request import RequestState
from metasoft_patches.transfer import to_device
from sglang_metasoft.chains import Chain, make_virtual_ids
from sglang_metasoft.commit import Committer
from sglang_metasoft.config import MetaSoftConfig
from sglang_metasoft.pipeline import compress_layer
from sglang_metasoft.score import load_method
from sglang_metasoft.types import Bypass, Job, ModelShape, Plan, Prompt

logger = logging.getLogger(__name__)

# Chains of one prompt that are tried against the tree; more exist only where prompts nearly repeat each other.
MAX_CANDIDATES = 3


class SchedulerCompressor:
    """One per scheduler process.

    Args:
        scheduler: SGLang's, fully constructed.
        config: the server's settings.

    Raises:
        ValueError: the model, its pool or the trained compressor cannot be served.
    """

    def __init__(self, scheduler, config: MetaSoftConfig) -> None:
        self.scheduler = scheduler
        self.config = config
        self.runner = scheduler.tp_worker.model_runner
        self.committer = Committer(scheduler.tree_cache)
        self.page_size = scheduler.page_size
        self.shape = model_shape(scheduler.model_config)
        self._check_model()
        self.method = load_method(config.method)(config, self.shape, self._embed, torch.device(self.runner.device))
        rank, size = get_parallel().attn_tp_rank, get_parallel().attn_tp_size
        self.first_kv_head = rank * self.shape.num_kv_heads // size
        self.trace_rank = rank
        # Compressions under other settings are other content.
        self.settings_id = f"{config.describe()} {self.method.identity}"
        logger.info("MetaSoft is active: %s; %s", self.method.description, config.describe())

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.runner.model.model.embed_tokens(ids)

    def _check_model(self) -> None:
        pool = self.committer.pool
        if type(pool) is not MHATokenToKVPool or pool.use_hnd or pool.kv_cache_layout not in (None, "nhd"):
            raise ValueError(
                f"--enable-metasoft: KV pool {type(pool).__name__} (layout {pool.kv_cache_layout}) is not supported; "
                "supported: MHATokenToKVPool in its default layout"
            )
        model = self.runner.model
        if not hasattr(getattr(model, "model", None), "embed_tokens"):
            raise ValueError(f"--enable-metasoft: model class {type(model).__name__} is not supported: no decoder body")
        layers = [module for module in model.modules() if isinstance(module, RadixAttention)]
        unusual = [
            layer.layer_id
            for layer in layers
            if layer.sliding_window_size > 0 or layer.logit_cap or layer.attn_type != AttentionType.DECODER
            or layer.is_cross_attention or layer.v_head_dim != layer.head_dim
        ]  # fmt: skip
        if unusual or len(layers) != self.shape.num_layers:
            raise ValueError(
                f"--enable-metasoft: model class {type(model).__name__} is not supported: attention layers {unusual} "
                "are not plain causal attention"
                if unusual
                else f"--enable-metasoft: {len(layers)} attention layers found, {self.shape.num_layers} expected"
            )

    # -- per batch ---------------------------------------------------------------------------------------------

    def compress_finished(self, batch) -> None:
        """Compress the requests of a just launched batch whose prefill it completes.

        Called right after the forward was launched: nothing here waits for the device. Requests that cannot be
        compressed stay raw, with the reason on their state.
        """
        chosen = self._choose(batch)
        if not chosen:
            return
        scheduler = self.scheduler
        overlap = scheduler.enable_overlap
        if overlap:
            # The forward still reads the rows that the steps below change.
            scheduler.schedule_stream.wait_stream(scheduler.forward_stream)
        reserved = []
        for position, req, plan in chosen:
            slots = self.committer.reserve(plan.kept_slots)
            if slots is None:
                self._skip(req, Bypass.NO_FREE_SLOTS)
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
                self._skip(req, Bypass.FAULT)
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
                self._skip(req, Bypass.FAULT)
                continue
            self._commit(req, plan, slots)
            shrink[position] = plan.saved_slots
        self._shrink_batch(batch, shrink)
        # SGLang keeps admission shut, once it was full, until a request leaves; here slots came free without one.
        scheduler.running_batch.batch_is_full = False

    def _choose(self, batch) -> list[tuple[int, object, Plan]]:
        decoding = {id(req) for req in batch.decoding_reqs or ()}
        chosen = []
        for position, req in enumerate(batch.reqs):
            state: RequestState | None = getattr(req, "metasoft", None)
            if state is None or state.plan is None or id(req) in decoding or req.finished():
                continue
            is_last_chunk = req.extend_end == len(req.full_untruncated_fill_ids)
            if is_last_chunk:
                if req.next_output_finishes_by_length():
                    self._skip(req, Bypass.FINISHES_NOW)
                    continue
                state.make_plan(self.config, self.page_size)
            elif self.config.during_prefill:
                state.make_plan(self.config, self.page_size, state.offset + req.extend_end)
            else:
                continue
            plan = state.plan
            if plan is not None and plan.end_slots >= req.kv.cache_protected_len:
                chosen.append((position, req, plan))
            elif plan is not None:
                self._skip(req, Bypass.SHARED_WINDOW)
            elif not is_last_chunk:
                state.make_plan(self.config, self.page_size)  # too little yet; the plan for the whole prompt stands
        return chosen

    def _skip(self, req, reason: Bypass) -> None:
        state: RequestState = req.metasoft
        if req.extend_end < len(req.full_untruncated_fill_ids):
            state.make_plan(self.config, self.page_size)  # the next chunk tries again
        else:
            state.skip(reason)

    def _run(self, items: list[tuple[object, Plan, torch.Tensor]]) -> list[bool]:
        """Probe, score, route, merge and write the new slots of all items; runs on the forward stream.

        Returns:
            For each item whether its entries may be committed. Only a CPU says no: any other device would have to
            be waited for, and there the stages themselves make harmless what is not finite.
        """
        jobs = [self._make_job(req, plan, slots) for req, plan, slots in items]
        trace = [[] for _ in jobs] if self.config.trace_dir else None
        order = {id(job): number for number, job in enumerate(jobs)}
        finite = [[] for _ in jobs]

        def on_layer(job, layer, q, k, v, pool):
            gate_scale = self.method.gate_scale(layer.layer_id, self.first_kv_head, layer.tp_k_head_num)
            out, routes, merged, is_finite = compress_layer(job, q, k, v, pool, self.method, self.config, gate_scale)
            finite[order[id(job)]].append(is_finite)
            if trace is not None:
                trace[order[id(job)]].append((routes.kept.cpu(), merged.key.cpu().clone(), merged.value.cpu().clone()))
            self.committer.write(layer, job.new_slots, merged)
            return out

        backend = ProbeBackend(self.committer.req_to_token_pool, self.committer.pool, jobs, on_layer)
        rows = to_device([req.kv.req_pool_idx for req, _, _ in items], torch.int64, self.runner.device)
        run_probe(self.runner, backend, rows)
        if trace is not None:
            for (req, plan, _), layers in zip(items, trace, strict=True):
                self._write_trace(req, plan, layers)
        if torch.device(self.runner.device).type != "cpu":
            return [True] * len(jobs)
        return [all(flags) for flags in finite]

    def _make_job(self, req, plan: Plan, slots: torch.Tensor) -> Job:
        state: RequestState = req.metasoft
        chain_tokens = state.chain.tokens if state.chain else 0
        span_end = chain_tokens + plan.span_tokens
        computed = state.offset + req.extend_end
        # Outputs of a retracted request come after the prompt; they are part of the tail.
        ids = state.raw_ids + req.output_ids
        probe = self.method.probe(
            Prompt(
                span_ids=to_device(ids[chain_tokens:span_end], torch.int64, self.runner.device),
                tail_ids=to_device(ids[span_end:computed], torch.int64, self.runner.device),
                context_slots=req.extend_end,
                context_tokens=computed,
            )
        )
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
        state.plan = None  # the checkpoint inside commit inserts the chain, not a raw prefix
        is_last_chunk = req.extend_end == len(req.full_untruncated_fill_ids)
        self.committer.commit(req, plan, slots, compact_ids, self.config.keep_raw, is_last_chunk)
        self.tree_cache.chains.add(self.namespace(req), chain, state.digests())
        if not is_last_chunk:
            state.make_plan(self.config, self.page_size)

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

    def namespace(self, req) -> tuple:
        """What separates chains: tenant, adapter and settings."""
        return (self.settings_id, req.extra_key, req.cache_salt, req.metasoft.namespace_options)

    def match_prefix(self, match, req, tree_cache, *args, **kwargs) -> None:
        """Match a waiting request against the tree in the form, raw or compact, that leaves the least to compute.

        Args:
            match: SGLang's ``Req.init_next_round_input``.
        """
        state: RequestState = req.metasoft
        state.restart(req)
        state.adopt_prompt(req)
        state.refusal = state.refusal or bypass_reason(req, self.config)
        chains = []
        if state.refusal is None:
            found = tree_cache.chains.candidates(self.namespace(req), state.raw_ids, state.digests(), MAX_CANDIDATES)
            chains = [chain for chain in found if not _reads_logprobs_inside(req, chain)]

        def match_with(chain: Chain | None) -> int:
            """Match in compact form with this chain, or raw; returns the logical tokens matched, -1 if it is gone."""
            state.restore_raw(req)
            if chain is not None:
                state.use_chain(req, chain)
            state.make_plan(self.config, self.page_size)
            match(req, tree_cache, *args, **kwargs)
            if chain is not None and req.prefix_len < chain.slots:
                tree_cache.chains.discard(chain)  # evicted from the tree meanwhile
                return -1
            return req.prefix_len + state.offset

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

    def admission_reserve(self, req, is_admission: bool) -> int:
        """Slots, beyond SGLang's own count, that a request needs while it is prefilled and compressed.

        Raw span and consolidated entries exist side by side for a moment. With ``during_prefill`` a long prompt never
        exists raw as a whole, so its admission asks for less than its raw length: the result is negative.

        Args:
            is_admission: the request is asking to be admitted; else a chunk of it is being charged.
        """
        plan: Plan = req.metasoft.plan
        raw_slots = len(req.full_untruncated_fill_ids) - req.prefix_len
        chunk_tokens = self.scheduler.chunked_prefill_size
        if self.config.during_prefill and chunk_tokens and is_admission:
            # Raw at any moment: one chunk, the window before it, and what was too short to compress after the last.
            too_short = self.config.min_tokens if chunk_tokens < self.config.min_tokens else 0
            raw_peak = chunk_tokens + self.config.window + self.page_size + too_short
            return plan.kept_slots + min(raw_peak - raw_slots, 0)
        wanted = raw_slots + plan.kept_slots + req.sampling_params.max_new_tokens + 2 * self.page_size
        return plan.kept_slots if wanted < self.scheduler.max_total_num_tokens else 0


def _reads_logprobs_inside(req, chain: Chain) -> bool:
    return req.return_logprob and 0 <= req.logprob_start_len < chain.tokens


def bypass_reason(req, config: MetaSoftConfig) -> Bypass | None:
    """Why compression cannot serve this request, or None. Lengths are the policy's business, not this table's."""
    params = req.sampling_params
    logprob_start = req.logprob_start_len
    checks = (
        (params.max_new_tokens == 0, Bypass.NO_OUTPUT),
        (req.multimodal_inputs is not None, Bypass.MULTIMODAL),
        (req.input_embeds is not None, Bypass.INPUT_EMBEDS),
        (req.positional_embed_overrides is not None, Bypass.EMBED_OVERRIDES),
        (req.session is not None or req.session_id is not None, Bypass.SESSION),
        (req.lora_id is not None, Bypass.LORA),
        (req.beam_group is not None, Bypass.BEAM_SEARCH),
        (req.custom_logit_processor is not None, Bypass.CUSTOM_LOGIT_PROCESSOR),
        (params.watermark is not None, Bypass.WATERMARK),
        (req.return_routed_experts or req.return_indexer_topk, Bypass.ROUTED_EXPERTS),
        (
            req.return_logprob and 0 <= logprob_start < len(req.origin_input_ids) - config.window,
            Bypass.PROMPT_LOGPROBS,
        ),
    )
    return next((reason for holds, reason in checks if holds), None)


def model_shape(model_config) -> ModelShape:
    """The served model, as a compressor knows it."""
    text = model_config.hf_text_config
    return ModelShape(
        name=str(model_config.model_path),
        vocab_size=model_config.vocab_size,
        hidden_size=model_config.hidden_size,
        num_layers=model_config.num_hidden_layers,
        num_heads=model_config.num_attention_heads,
        num_kv_heads=getattr(text, "num_key_value_heads", None) or model_config.num_attention_heads,
        head_dim=model_config.head_dim,
    )
