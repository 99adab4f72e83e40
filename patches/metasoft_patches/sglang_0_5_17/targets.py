"""Every place in SGLang 0.5.17 that MetaSoft hooks: what this version has of its own beside the common table."""

from metasoft_patches.hooks.targets import Target, common_targets

TARGETS = (
    *common_targets(entry="generate_request", arrival="handle_generate_request"),
    Target(
        "frontend",
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._wait_one_response",
        "around",
        "flatten_responses",
        ("self", "obj", "request"),
        "sglang.srt.managers.tokenizer_manager:TokenizerManager.generate_request",
    ),
    Target(
        "frontend",
        "sglang.srt.managers.scheduler.configure_scheduler_process",
        "after",
        "configure_scheduler",
        (
            "server_args",
            "gpu_id",
            "tp_rank",
            "attn_cp_rank",
            "moe_dp_rank",
            "moe_ep_rank",
            "pp_rank",
            "dp_rank",
            "display_tp_rank",
            "display_dp_rank",
            "display_moe_ep_rank",
        ),
        "sglang.srt.managers.scheduler:run_scheduler_process",
    ),
    Target(
        "scheduler",
        "sglang.srt.managers.scheduler.Scheduler.__init__",
        "after",
        "scheduler_made",
        (
            "self",
            "server_args",
            "port_args",
            "gpu_id",
            "tp_rank",
            "moe_ep_rank",
            "pp_rank",
            "attn_cp_rank",
            "moe_dp_rank",
            "dp_rank",
        ),
        "sglang.srt.managers.scheduler:run_scheduler_process",
    ),
    Target(
        "scheduler",
        "sglang.srt.managers.scheduler.Scheduler.handle_generate_request",
        "around",
        "request_arrives",
        ("self", "recv_req"),
        "sglang.srt.managers.scheduler:Scheduler.init_request_dispatcher",
    ),
    Target(
        "scheduler",
        "sglang.srt.managers.scheduler.Scheduler._maybe_namespace_elastic_radix_cache",
        "after",
        "request_created",
        ("self", "req"),
        "sglang.srt.managers.scheduler:Scheduler.handle_generate_request",
    ),
    Target(
        "scheduler",
        "sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new",
        "after",
        "shift_positions",
        ("cls", "batch", "model_runner", "capture_hidden_mode", "return_hidden_states_before_norm"),
        "sglang.srt.managers.tp_worker:TpModelWorker.forward_batch_generation",
    ),
    Target(
        "scheduler",
        "sglang.srt.managers.scheduler_components.output_streamer._GenerationStreamAccumulator.accept",
        "around",
        "report",
        ("self", "req"),
        "sglang.srt.managers.scheduler_components.output_streamer:SchedulerOutputStreamer._stream_output_generation",
    ),
    Target(
        "scheduler",
        "sglang.srt.managers.schedule_policy.PrefillAdder._mamba_gap_budget_for_req",
        "after",
        "reserve_slots",
        ("self", "req"),
        "sglang.srt.managers.schedule_policy:PrefillAdder.add_one_req",
    ),
)

# What the adapter uses besides hooks: function and parameters.
USED = (
    ("sglang.srt.plugins.hook_registry:HookRegistry.register", ("cls", "target", "hook", "hook_type", "source")),
    ("sglang.srt.plugins.hook_registry:HookRegistry._apply_target", ("cls", "target", "hooks")),
    (
        "sglang.srt.mem_cache.unified_radix_cache:UnifiedRadixCache.cache_unfinished_req",
        ("self", "req", "chunked", "**kwargs"),
    ),
    (
        "sglang.srt.mem_cache.unified_radix_cache:UnifiedRadixCache.cache_finished_req",
        ("self", "req", "is_insert", "kv_len_to_handle", "**kwargs"),
    ),
    ("sglang.srt.model_executor.forward_context:forward_context", ("ctx",)),
    ("sglang.srt.arg_groups.overrides:resolved_view", ("server_args",)),
    ("sglang.srt.server_args:ServerArgs.get_model_config", ("self",)),
    ("sglang.srt.lora.lora_manager:LoRAManager.prepare_lora_batch", ("self", "forward_batch")),
    ("sglang.srt.lora.lora_manager:LoRAManager.reset_lora_batch", ("self",)),
    ("sglang.srt.managers.schedule_batch:Req.set_extend_range", ("self", "start", "end")),
    ("sglang.srt.managers.schedule_batch:Req._refresh_fill_ids", ("self",)),
)

# Decode graphs read a position buffer of their own. It must be filled from the batch's positions at every replay, to
# which the offset was added. With M-RoPE they read three rows, made in init_new and copied there by name as well.
PINNED = (
    (
        "sglang.srt.model_executor.runner.decode_cuda_graph_runner:DecodeCudaGraphRunner.load_batch",
        (
            "self.buffers.positions[:self.raw_num_token].copy_(forward_batch.positions)",
            "self.buffer_registry.fill_from(forward_batch,",
        ),
    ),
    (
        "sglang.srt.model_executor.cuda_graph_buffer_registry:CudaGraphBufferRegistry.fill_from",
        ("for slot in self._slots.values():", "src = getattr(forward_batch, slot.name, None)"),
    ),
    (
        "sglang.srt.model_executor.forward_batch_info:ForwardBatch.init_new",
        ("ret._compute_mrope_positions(model_runner, batch)", "return ret"),
    ),
    (
        "sglang.srt.model_executor.cuda_graph_buffer_registry:build_decode_registry",
        ("GraphSlot('mrope_positions', lambda _bs2, mt: (3, mt)", "slice_fn=lambda buf, n: buf[:, :n]"),
    ),
)
