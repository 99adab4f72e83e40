"""Hooks outside the scheduler: flags, keywords of ``sgl.Engine``, start-up checks, requests and responses."""

import argparse
import dataclasses
import functools
import logging
import secrets
import typing

import torch
from sglang.srt.plugins.hook_registry import HookRegistry

from metasoft_patches import compat
from metasoft_patches.adapter import load_adapter
from metasoft_patches.cache.radix import make_factory
from metasoft_patches.hooks.contract import check_build
from metasoft_patches.hooks.install import register_hooks, verify_hooks
from sglang_metasoft.config import (
    BACKEND_NAME,
    MetaSoftConfig,
    check_config,
    check_setting,
    read_config_json,
    settings_of,
    shown,
)
from sglang_metasoft.methods import auto
from sglang_metasoft.request_options import RequestOptions
from sglang_metasoft.train import at_start

logger = logging.getLogger(__name__)

ENABLE_FLAG = "--enable-metasoft"
PREFIX = "metasoft_"
# ServerArgs rejects undeclared fields, but carries underscore attributes to every scheduler process.
CARRIER = "_metasoft"


def add_flags(result, parser: argparse.ArgumentParser) -> None:
    """AFTER ``ServerArgs.add_cli_args``: MetaSoft's own group in ``--help``."""
    group = parser.add_argument_group("MetaSoft", "KV-cache compression of long prompts, prefix sharing kept on")
    group.add_argument(
        ENABLE_FLAG, action="store_true", help="Compress the KV cache of long prompts after their prefill."
    )
    for name, field in settings_of().items():
        if field.metadata["flag"] is None:
            continue
        help_text = f"{field.metadata['help']} Allowed: {field.metadata['allowed']}."
        if field.default is not None:
            help_text += f" Default: {field.default}."
        if isinstance(field.default, bool):
            group.add_argument(
                field.metadata["flag"], dest=PREFIX + name, action=argparse.BooleanOptionalAction, help=help_text
            )
        else:
            group.add_argument(
                field.metadata["flag"], dest=PREFIX + name, type=_checked_type(name, field), help=help_text
            )
    group.add_argument(
        "--metasoft-config",
        type=_argument_type(read_config_json),
        help="JSON object with the same keys (ratio, window, ...), also for settings without a flag.",
    )


def _argument_type(parse):
    """Let argparse print a ValueError's own words."""

    @functools.wraps(parse)
    def convert(text: str):
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def _checked_type(name: str, field: dataclasses.Field):
    python_type = next(kind for kind in (typing.get_args(field.type) or (field.type,)) if kind in (int, float, str))

    def parse(text: str):
        try:
            value = python_type(text)
        except ValueError:
            value = text
        check_setting(name, value, field)
        return value

    return _argument_type(parse)


def read_flags(original, cls, args: argparse.Namespace):
    """AROUND ``ServerArgs.from_cli_args``: take our values off the command line and put them on the record."""
    values = {name: getattr(args, PREFIX + name, None) for name in settings_of()}
    values = {name: value for name, value in values.items() if value is not None}
    config = _make_config(bool(getattr(args, "enable_metasoft", False)), values, args.metasoft_config or {})
    if config is not None:
        compat.check_class(args.model_path)
        if args.radix_cache_backend is None:
            args.radix_cache_backend = BACKEND_NAME
    record = original(cls, args)
    setattr(record, CARRIER, config)
    return record


def _make_config(enabled: bool, values: dict, from_json: dict) -> MetaSoftConfig | None:
    """The settings of this server, or None without ``--enable-metasoft``.

    Raises:
        ValueError: settings without the switch, a setting given twice, or an unsupported SGLang.
    """
    given = sorted(set(values) | set(from_json))
    if not enabled:
        if given:
            raise ValueError(f"metasoft {', '.join(given)} given without {ENABLE_FLAG}")
        return None
    twice = sorted(set(values) & set(from_json))
    if twice:
        raise ValueError(f"metasoft {', '.join(twice)} given both as a flag and in --metasoft-config")
    compat.check_sglang_version()
    check_build()
    return MetaSoftConfig(**(from_json | values))


def extend_engine() -> None:
    """Let ``sgl.Engine`` take ``enable_metasoft=True`` and the ``metasoft_*`` keywords."""
    from sglang.srt.entrypoints.engine import Engine

    record_class = Engine.server_args_class

    def make_server_args(**kwargs):
        enabled = kwargs.pop("enable_metasoft", False)
        if not isinstance(enabled, bool):
            raise ValueError(f"enable_metasoft: {shown(enabled)} is not allowed; allowed: True or False")
        given = kwargs.pop("metasoft_config", None)
        from_json = read_config_json(given) if isinstance(given, str) else check_config({} if given is None else given)
        names = [key for key in kwargs if key.startswith(PREFIX)]
        unknown = [key for key in names if key.removeprefix(PREFIX) not in settings_of()]
        if unknown:
            allowed = ", ".join(PREFIX + name for name in settings_of())
            raise ValueError(f"unknown keyword {unknown[0]!r}; allowed: enable_metasoft, metasoft_config, {allowed}")
        values = {key.removeprefix(PREFIX): kwargs.pop(key) for key in names}
        config = _make_config(enabled, values, from_json)
        if config is not None:
            compat.check_class(kwargs.get("model_path"))
            kwargs.setdefault("radix_cache_backend", BACKEND_NAME)
        record = record_class(**kwargs)
        setattr(record, CARRIER, config)
        return record

    Engine.server_args_class = staticmethod(make_server_args)


def check_server(result, server_args) -> None:
    """AFTER ``ServerArgs.check_server_args``, in the parent process, before any model loads."""
    config: MetaSoftConfig | None = getattr(server_args, CARRIER, None)
    if config is None:
        return
    if not config.secret:  # the record was pickled on its way to this process, which starts the schedulers
        config = dataclasses.replace(config, secret=secrets.token_hex(16))
        setattr(server_args, CARRIER, config)
    from metasoft_patches.forward.model_shape import model_shape
    from metasoft_patches.http import app as http

    adapter = load_adapter()
    verify_hooks(adapter.targets_of("flags", "frontend"))
    if name := compat.untested_platform():
        logger.warning("MetaSoft: nothing of it has been tested on %s; compare answers before you rely on them.", name)
    settings, model_config = adapter.settings(server_args)
    compat.check_features(settings, model_config)
    if config.keep_raw and settings.enable_hierarchical_cache and settings.hicache_write_policy == "write_back":
        logger.warning(
            "MetaSoft: raw spans are not kept in the tree (as by --no-metasoft-keep-raw): with --hicache-write-policy "
            "write_back each would be copied to the host, and take ratio times the room of what it became."
        )
        config = dataclasses.replace(config, keep_raw=False)
        setattr(server_args, CARRIER, config)
    if config.kernels == "triton":
        from metasoft_kernels.backend import check_device

        check_device(torch.device(settings.device))
    shape = model_shape(model_config)
    auto.check(config, shape, settings.tp_size)
    at_start.check(config, settings.nnodes)
    at_start.fit_if_missing(config, shape, server_args.model_path)
    http.prepare(settings.tokenizer_worker_num)


def configure_scheduler(result, server_args, *args, **kwargs) -> None:
    """AFTER ``configure_scheduler_process``: install the scheduler's hooks, if this server compresses."""
    config: MetaSoftConfig | None = getattr(server_args, CARRIER, None)
    if config is None:
        return
    if not config.secret:
        raise RuntimeError("MetaSoft: the server's secret did not come with its settings")
    from sglang.srt.mem_cache.registry import register_radix_cache_backend

    adapter = load_adapter()
    register_radix_cache_backend(BACKEND_NAME, make_factory(config, adapter))
    targets = adapter.targets_of("scheduler")
    register_hooks(targets, adapter.hooks.SchedulerHooks(config, adapter))
    HookRegistry.apply_hooks()
    verify_hooks(targets)


def check_request(result, params, vocab_size: int) -> None:
    """AFTER ``SamplingParams.verify``: a bad ``custom_params`` value is a client error (HTTP 400)."""
    RequestOptions.parse(params.custom_params)


def check_adapter(manager, request) -> None:
    """BEFORE ``TokenizerManager._validate_and_resolve_lora``, which sets ``lora_id``: a client's own is an error.

    It would reach the scheduler as it is, where an id that is not loaded ends the process.
    """
    is_clients = request.lora_id is not None and not request.lora_path
    if is_clients and getattr(manager.server_args, CARRIER, None) is not None:
        raise ValueError(f"lora_id: {shown(request.lora_id)} is not allowed; an adapter is named by lora_path")
