"""Every place in SGLang 0.5.23 that MetaSoft hooks."""

from metasoft_patches.targets import FLAG_TARGETS, Target

TARGETS = (
    *FLAG_TARGETS,
    Target(
        "frontend",
        "sglang.srt.server_args.ServerArgs.check_server_args",
        "after",
        "check_server",
        ("self",),
        "sglang.srt.entrypoints.engine:Engine._launch_subprocesses",
    ),
    Target(
        "frontend",
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.generate_request",
        "around",
        "enter",
        ("self", "obj", "request"),
        "sglang.srt.entrypoints.http_server:serve_generate_request",
    ),
    Target(
        "frontend",
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request",
        "after",
        "check_prompt",
        ("self", "obj", "input_ids"),
        "sglang.srt.managers.tokenizer_manager:TokenizerManager._tokenize_one_request",
    ),
    Target(
        "frontend",
        "sglang.srt.sampling.sampling_params.SamplingParams.verify",
        "after",
        "check_request",
        ("self", "vocab_size"),
        "sglang.srt.managers.tokenizer_manager:TokenizerManager._create_tokenized_object",
    ),
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
        "sglang.srt.managers.scheduler.Scheduler.run_batch",
        "after",
        "batch_launched",
        ("self", "batch", "pp_proxy_tensors"),
        "sglang.srt.managers.scheduler:Scheduler.event_loop_overlap",
    ),
    Target(
        "scheduler",
        "sglang.srt.managers.scheduler.Scheduler.on_idle",
        "after",
        "scheduler_idles",
        ("self",),
        "sglang.srt.managers.scheduler:Scheduler.event_loop_overlap",
    ),
    Target(
        "scheduler",
        "sglang.srt.managers.scheduler.Scheduler.get_internal_state",
        "after",
        "show_state",
        ("self", "recv_req"),
        "sglang.srt.managers.scheduler:Scheduler.init_request_dispatcher",
    ),
    Target(
        "scheduler",
        "sglang.srt.managers.schedule_batch.Req.init_next_round_input",
        "around",
        "match_prefix",
        ("self", "tree_cache", "cow_mamba"),
        "sglang.srt.managers.scheduler:Scheduler._get_new_batch_prefill_raw",
    ),
    Target(
        "scheduler",
        "sglang.srt.managers.schedule_batch.Req._compute_max_prefix_len",
        "after",
        "cap_prefix",
        ("self", "input_len"),
        "sglang.srt.managers.schedule_batch:Req.init_next_round_input",
    ),
    Target(
        "scheduler",
        "sglang.srt.managers.schedule_batch.Req.reset_for_retract",
        "after",
        "request_retracted",
        ("self",),
        "sglang.srt.managers.schedule_batch:release_req",
    ),
    Target(
        "scheduler",
        "sglang.srt.managers.schedule_batch.ScheduleBatch.prepare_for_extend",
        "around",
        "prepare_extend",
        ("self",),
        "sglang.srt.managers.scheduler:Scheduler._get_new_batch_prefill_raw",
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
        "sglang.srt.managers.scheduler_components.output_streamer._GenerationStreamAccumulator.accept",
        "around",
        "report_logical_length",
        ("self", "req"),
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
        "sglang.srt.managers.schedule_policy.PrefillAdder.add_chunked_req",
        "around",
        "add_chunk",
        ("self", "req"),
        "sglang.srt.managers.scheduler:Scheduler._get_new_batch_prefill_raw",
    ),
    Target(
        "scheduler",
        "sglang.srt.managers.scheduler.Scheduler.init_req_max_new_tokens",
        "around",
        "limit_length",
        ("self", "req"),
        "sglang.srt.managers.scheduler:Scheduler._handle_generate_request",
    ),
    *(
        Target(
            "scheduler",
            f"sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager.{name}",
            "after",
            "weights_changed",
            ("self", "recv_req"),
            "sglang.srt.managers.scheduler:Scheduler.init_request_dispatcher",
        )
        for name in (
            "update_weights_from_disk",
            "update_weights_from_distributed",
            "update_weights_from_tensor",
            "update_weights_from_ipc",
            "end_weight_update",
        )
    ),
)

# What the adapter uses besides hooks: function and parameters.
USED = (
    ("sglang.srt.mem_cache.registry:create_unified_radix_cache", ("ctx", "cache_class")),
    ("sglang.srt.mem_cache.unified_radix_cache:UnifiedRadixCache.checkpoint", ("self", "req", "up_to", "**kwargs")),
    ("sglang.srt.model_executor.forward_context:forward_context", ("ctx", "forward_batch")),
    ("sglang.srt.arg_groups.model_override_base:resolving_view", ("server_args",)),
    ("sglang.srt.arg_groups.model_override_base:model_config_of", ("server_args",)),
    ("sglang.srt.managers.schedule_batch:Req.refresh_fill_ids", ("self",)),
)

# Decode graphs read a position buffer of their own. It must be filled from the batch's positions at every replay, to
# which the offset was added; that is skipped only for the very tensor that it was filled from: never for a new one.
PINNED = (
    (
        "sglang.srt.model_executor.runner.decode_cuda_graph_runner:DecodeCudaGraphRunner._copy_replay_inputs",
        (
            "if prefilled is None or forward_batch.positions is not prefilled[1]:",
            "self.buffers.positions[:self.raw_num_token].copy_(forward_batch.positions)",
        ),
    ),
)
