"""Every place in SGLang 0.5.23 that MetaSoft hooks: what this version has of its own beside the common table."""

from metasoft_patches.hooks.targets import Target, common_targets

TARGETS = (
    *common_targets(entry="serve_generate_request", arrival="_handle_generate_request"),
    Target(
        "frontend",
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.update_request_meta_info",
        "around",
        "flatten_meta_info",
        ("self", "meta_info", "state", "customized_info", "index", "finish_reason"),
        "sglang.srt.managers.tokenizer_manager:TokenizerManager._handle_batch_output",
    ),
    Target(
        "frontend",
        "sglang.srt.managers.scheduler.configure_scheduler_process",
        "after",
        "configure_scheduler",
        ("server_args", "gpu_id", "display_tp_rank", "display_dp_rank", "display_moe_ep_rank"),
        "sglang.srt.managers.scheduler:run_scheduler_process",
    ),
    Target(
        "scheduler",
        "sglang.srt.managers.scheduler.Scheduler.__init__",
        "after",
        "scheduler_made",
        ("self", "server_args", "port_args"),
        "sglang.srt.managers.scheduler:run_scheduler_process",
    ),
    Target(
        "scheduler",
        "sglang.srt.managers.scheduler.Scheduler._create_generation_req",
        "after",
        "generation_req_created",
        ("self", "recv_req", "*args", "**kwargs"),
        "sglang.srt.managers.scheduler:Scheduler._handle_generate_request",
    ),
    Target(
        "scheduler",
        "sglang.srt.managers.scheduler.Scheduler.get_output_streamer_class",
        "after",
        "output_streamer_class",
        ("self",),
        "sglang.srt.managers.scheduler:Scheduler.init_output_streamer",
    ),
    Target(
        "scheduler",
        "sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new",
        "after",
        "shift_positions",
        (
            "cls",
            "batch",
            "model_runner",
            "capture_hidden_mode",
            "return_hidden_states_before_norm",
            "extend_position_info",
            "spec_mrope_positions",
            "kv_loc_plan",
            "write_cols",
        ),
        "sglang.srt.managers.tp_worker:TpModelWorker.forward_batch_generation",
    ),
    Target(
        "scheduler",
        "sglang.srt.managers.scheduler_components.output_streamer._GenerationStreamAccumulator.to_payload",
        "around",
        "report_lengths",
        ("self", "dp_rank", "is_idle_batch"),
        "sglang.srt.managers.scheduler_components.output_streamer:SchedulerOutputStreamer._stream_output_generation",
    ),
    Target(
        "scheduler",
        "sglang.srt.managers.schedule_policy.PrefillAdder._request_slot_reserve_for_req",
        "after",
        "reserve_slots",
        ("self", "req", "extend_input_len"),
        "sglang.srt.managers.schedule_policy:PrefillAdder.add_one_req",
    ),
    Target(
        "scheduler",
        "sglang.srt.managers.scheduler.Scheduler.attach_hicache_storage_wrapped",
        "around",
        "refuse_storage",
        ("self", "recv_req"),
        "sglang.srt.managers.scheduler:Scheduler.init_request_dispatcher",
    ),
    Target(
        "scheduler",
        "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager.end_weight_update",
        "after",
        "weights_changed",
        ("self", "recv_req"),
        "sglang.srt.managers.scheduler:Scheduler.init_request_dispatcher",
    ),
)

# What the adapter uses besides hooks: function and parameters.
USED = (
    ("sglang.srt.plugins.hook_registry:HookRegistry.register", ("cls", "target", "hook", "hook_type", "source")),
    ("sglang.srt.plugins.hook_registry:HookRegistry._apply_target", ("cls", "target", "hooks")),
    ("sglang.srt.mem_cache.registry:create_unified_radix_cache", ("ctx", "cache_class")),
    ("sglang.srt.mem_cache.unified_radix_cache:UnifiedRadixCache.checkpoint", ("self", "req", "up_to", "**kwargs")),
    ("sglang.srt.mem_cache.unified_radix_cache:UnifiedRadixCache.init_load_back", ("self", "params")),
    ("sglang.srt.managers.schedule_batch:Req.materialized_host_hit_len", ("self",)),
    ("sglang.srt.model_executor.forward_context:forward_context", ("ctx", "forward_batch")),
    ("sglang.srt.arg_groups.model_override_base:resolving_view", ("server_args",)),
    ("sglang.srt.arg_groups.model_override_base:model_config_of", ("server_args",)),
    ("sglang.srt.managers.schedule_batch:Req.refresh_fill_ids", ("self",)),
    ("sglang.srt.lora.lora_manager:LoRAManager.prepare_lora_batch", ("self", "forward_batch")),
    ("sglang.srt.lora.lora_manager:LoRAManager.reset_lora_batch", ("self",)),
)

# A load-back that is declined (None) leaves its request in the queue, nothing committed. A raw twin gets no copy on the
# host, since what a request has inserted before counts no hit; what is loaded however small is so by the threshold.
PINNED_HOST_POOL = (
    (
        "sglang.srt.managers.schedule_policy:PrefillAdder.add_one_req",
        (
            "loaded = self.tree_cache.init_load_back(",
            "if loaded is None:\n",
            "return AddReqResult.OTHER",
            "req.host_loaded_length, req.last_node = loaded",
            "self._commit_prefill_admission(",
        ),
    ),
    (
        "sglang.srt.mem_cache.unified_radix_cache:UnifiedRadixCache._load_back_transfers",
        ("kv_tokens < max(1, self.load_back_threshold)",),
    ),
    (
        "sglang.srt.mem_cache.unified_radix_cache:UnifiedRadixCache.checkpoint_into_tree",
        ("inserted_len=req.kv.cache_inserted_len,",),
    ),
    (
        "sglang.srt.mem_cache.unified_cache.unified_tree_core:UnifiedTreeCore._finish_insert_walk_node",
        ("if node_end > state.params.inserted_len and self._inc_hit_count_and_check(node):",),
    ),
    (
        "sglang.srt.mem_cache.unified_cache.unified_tree_core:UnifiedTreeCore._should_backup_after_insert",
        ("leaf_end > state.params.inserted_len",),
    ),
)

# Decode graphs read a position buffer of their own. It must be filled from the batch's positions at every replay, to
# which the offset was added; that is skipped only for the very tensor that it was filled from: never for a new one.
# With M-RoPE they read three rows of positions, made in init_new and copied to the graph's buffer by name.
PINNED = (
    *PINNED_HOST_POOL,
    (
        "sglang.srt.model_executor.runner.decode_cuda_graph_runner:DecodeCudaGraphRunner._copy_replay_inputs",
        (
            "if prefilled is None or forward_batch.positions is not prefilled[1]:",
            "self.buffers.positions[:self.raw_num_token].copy_(forward_batch.positions)",
        ),
    ),
    (
        "sglang.srt.model_executor.forward_batch_info:ForwardBatch.init_new",
        ("ret._compute_mrope_positions(model_runner, batch)", "return ret"),
    ),
    (
        "sglang.srt.model_executor.runner.decode_cuda_graph_runner:DecodeCudaGraphRunner.load_batch",
        ("if not forward_batch.needs_forward_metadata_init():", "self.buffer_registry.fill_from(forward_batch,"),
    ),
    (
        "sglang.srt.model_executor.cuda_graph_buffer_registry:build_decode_registry",
        ("GraphSlot('mrope_positions', lambda _bs2, mt: (3, mt)", "slice_fn=lambda buf, n: buf[:, :n]"),
    ),
    (
        "sglang.srt.model_executor.cuda_graph_buffer_registry:CudaGraphBufferRegistry.fill_from",
        ("src = getattr(forward_batch, slot.name, None)", "_grouped_foreach_copy_(gpu_dsts, gpu_srcs)"),
    ),
    (
        "sglang.srt.model_executor.runner.prefill_cuda_graph_runner:PrefillCudaGraphRunner._get_layer_model_positions",
        ("getattr(model, 'is_mrope_enabled', False)", "return forward_batch.mrope_positions"),
    ),
    (
        "sglang.srt.model_executor.cpu_graph_runner:CPUGraphRunner.prepare_replay",
        ("self.mrope_positions[:, :raw_num_token].copy_(forward_batch.mrope_positions)",),
    ),
)
