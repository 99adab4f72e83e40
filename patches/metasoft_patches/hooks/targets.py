"""The form of a hook table, and the hooks that all supported versions of SGLang have in common.

Each supported version has a table of its own, ``sglang_<version>/targets.py``: every place in that SGLang that MetaSoft
hooks, with path, expected parameters, and who calls it. The tables are plain data, so that the contract test can check
them against SGLang's source without importing it. ``hook`` names a function or method of the version's ``hooks.py``.
"""

from typing import NamedTuple


class Target(NamedTuple):
    """One hook.

    ``stage`` says when it is installed: "flags" and "frontend" when the plugin loads, "scheduler" in a scheduler
    process and only with ``--enable-metasoft``. ``caller`` is a function of SGLang, ``module:qualified.name``, whose
    body must call the target by its name.
    """

    stage: str
    path: str
    kind: str  # before, after, around
    hook: str
    parameters: tuple[str, ...]
    caller: str


# Also hooked in a version that is not supported, so that --enable-metasoft can say so there.
FLAG_TARGETS = (
    Target(
        "flags",
        "sglang.srt.server_args.ServerArgs.add_cli_args",
        "after",
        "add_flags",
        ("parser",),
        "sglang.srt.server_args:prepare_server_args",
    ),
    Target(
        "flags",
        "sglang.srt.server_args.ServerArgs.from_cli_args",
        "around",
        "read_flags",
        ("cls", "args"),
        "sglang.srt.server_args:prepare_server_args",
    ),
)


def common_targets(*, entry: str, arrival: str) -> tuple[Target, ...]:
    """The hooks that differ between versions in a caller's name at most.

    Args:
        entry: the HTTP server's function for ``/generate``.
        arrival: the scheduler's method for a request that arrives.
    """
    return (
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
            f"sglang.srt.entrypoints.http_server:{entry}",
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
            "sglang.srt.managers.tokenizer_manager.TokenizerManager._create_tokenized_object",
            "after",
            "check_message",
            ("self", "obj", "input_text", "input_ids", "input_embeds", "mm_inputs", "token_type_ids"),
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
            "sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_and_resolve_lora",
            "before",
            "check_adapter",
            ("self", "obj"),
            "sglang.srt.managers.tokenizer_manager:TokenizerManager.generate_request",
        ),
        Target(
            "scheduler",
            "sglang.srt.managers.scheduler.Scheduler.run_batch",
            "around",
            "run_batch",
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
            f"sglang.srt.managers.scheduler:Scheduler.{arrival}",
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
            )
        ),
    )
