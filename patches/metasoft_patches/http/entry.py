"""Where requests enter, in the process of the tokenizer: settings from HTTP headers, and the outcome's way back."""

import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import Any

from sglang.srt.managers.io_struct import GenerateReqInput

from metasoft_patches.frontend import CARRIER, PREFIX
from metasoft_patches.http import limits
from metasoft_patches.http.headers import SCOPE_KEY, SETTINGS, Exchange
from sglang_metasoft.config import shown
from sglang_metasoft.request_options import RequestOptions, RequestRefused

# Objects of a request's body in which somebody may look for a place for settings.
PLACES = ("custom_params", "sampling_params", "parameters", "options", "extra_body", "metadata")


def is_ours(manager, obj) -> bool:
    """Whether this server compresses, and generates for this request."""
    return isinstance(obj, GenerateReqInput) and getattr(manager.server_args, CARRIER, None) is not None


def enter(original, manager, obj, request=None):
    """AROUND ``TokenizerManager.generate_request``, an asynchronous generator of responses."""
    if not is_ours(manager, obj):
        return original(manager, obj, request)
    return _enter(original, manager, obj, request)


async def _enter(original, manager, obj: GenerateReqInput, request) -> AsyncIterator[Any]:
    exchange: Exchange | None = getattr(request, "scope", {}).get(SCOPE_KEY)  # sgl.Engine has no request
    try:
        limits.check_call(obj)
        await _take_settings(manager, obj, request, exchange)
        async with contextlib.aclosing(original(manager, obj, request)) as responses:
            async for response in responses:
                if exchange is not None:
                    exchange.report(_metas(obj, response))
                yield response
    except RequestRefused as error:
        if exchange is not None:
            exchange.refusal = str(error)
        raise


async def _take_settings(manager, obj: GenerateReqInput, request, exchange: Exchange | None) -> None:
    """Check the settings that the body brings, and add the headers'.

    Raises:
        RequestRefused: a bad value, two values for one setting, or a key where nobody would read it.
    """
    params = obj.sampling_params
    samplings = [each for each in (params if isinstance(params, list) else [params]) if isinstance(each, dict)]
    for sampling in samplings:
        RequestOptions.parse(sampling.get("custom_params"))
    if exchange is None:
        return
    await _check_places(request, samplings)
    if not exchange.options:
        return
    preferred = (manager.preferred_sampling_params or {}).get("custom_params") or {}
    kept = {key: value for key, value in preferred.items() if not key.startswith(PREFIX)} or None

    def merged(sampling: dict) -> dict:
        custom_params = exchange.merge(sampling.get("custom_params", kept))
        RequestOptions.parse(custom_params)
        return {**sampling, "custom_params": custom_params}

    if isinstance(params, list):
        obj.sampling_params = [merged(each) if isinstance(each, dict) else each for each in params]
    elif params is None or isinstance(params, dict):
        obj.sampling_params = merged(params or {})


def check_prompt(result, manager, obj, input_ids) -> None:
    """AFTER ``TokenizerManager._validate_one_request``: what can only be said of the tokens."""
    if not is_ours(manager, obj):
        return
    limits.check_prompt(obj, input_ids, manager.model_config.vocab_size)
    boundary = RequestOptions.parse(obj.sampling_params.get("custom_params")).get("boundary")
    # A session's earlier turns, and what a processor makes of images, are only known to the scheduler.
    if boundary is not None and input_ids is not None and boundary >= len(input_ids) and not obj.session_params:
        raise RequestRefused(RequestOptions.beyond_prompt(boundary, len(input_ids)))


def check_message(message, manager, obj, *args, **kwargs) -> None:
    """AFTER ``TokenizerManager._create_tokenized_object``: the last moment before the scheduler."""
    if is_ours(manager, obj):
        limits.check_message(message)
        limits.check_sampling(message.sampling_params, manager.model_config.vocab_size)


async def _check_places(request, samplings: list[dict]) -> None:
    """Refuse a ``metasoft_`` key of the body that did not become one of the request's ``custom_params``."""
    try:
        body = await request.json()  # kept by Starlette, which has parsed it for the endpoint
    except (ValueError, RuntimeError):  # no JSON, or a form
        return
    arrived = Counter(
        key for sampling in samplings for key in _own_keys(sampling.get("custom_params"), within=(), depth=0)
    )
    for key in Counter(_own_keys(body, PLACES, depth=3)) - arrived:
        header = f"x-{key.replace('_', '-')}"
        allowed = f"the header {header}" if header in SETTINGS else f"the headers {', '.join(SETTINGS)}"
        raise RequestRefused(
            f"{shown(key)} is not read where the body has it; allowed: {allowed}, or custom_params where there are some"
        )


def _own_keys(value: Any, within: tuple[str, ...], depth: int) -> Iterator[str]:
    """Keys with our prefix in an object, and in the objects and lists that it has under the names ``within``."""
    if isinstance(value, list):
        for each in value:
            if isinstance(each, dict):
                yield from _own_keys(each, within, depth)
    elif isinstance(value, dict):
        for key, inner in value.items():
            if isinstance(key, str) and key.startswith(PREFIX):
                yield key
            elif depth and key in within:
                yield from _own_keys(inner, within, depth - 1)


def _metas(obj: GenerateReqInput, response: Any) -> list[dict]:
    """``meta_info`` of one response for each prompt; none if a stream will only show them one after another."""
    if isinstance(response, list):
        return [each.get("meta_info", {}) for each in response[:: obj.parallel_sample_num or 1]]
    if obj.stream and not obj.is_single and obj.batch_size > 1:
        return []
    return [response.get("meta_info", {})]
