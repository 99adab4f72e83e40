"""Requests that would end SGLang's scheduler are refused where they enter.

The defects are SGLang's own, with or without this package; docs/security.md has the list.
"""

import copy
from typing import Any

import msgspec
from sglang.srt.managers.io_struct import GenerateReqInput, TokenizedGenerateReqInput

from sglang_metasoft.config import RequestRefused, shown

MAX_SAMPLES = 1024  # answers to one prompt
MAX_BIAS = 1e30  # far from where a sum with float32 logits is no number
INT32, INT64 = 2**31, 2**63
# SGLang fills these itself, and takes a request that brings them for one that is done.
INTERNAL = ("is_normalized", "stop_strs", "stop_regex_strs", "stop_str_max_len", "stop_regex_max_len")
# Long, and made by the tokenizer's process itself.
BULK = (
    "input_ids", "input_text", "input_embeds", "mm_inputs", "token_type_ids", "time_stats",
    "positional_embed_overrides",
)  # fmt: skip


def refuse(name: str, value: Any, allowed: str) -> None:
    raise RequestRefused(f"{name}: {shown(value)} is not allowed; allowed: {allowed}")


def check_call(obj: GenerateReqInput) -> None:
    """What must be known before the request is spread out into its prompts and samples."""
    params = obj.sampling_params
    for sampling in params if isinstance(params, list) else [params]:
        if not isinstance(sampling, dict):
            continue
        for name in ("n", "beam_width"):
            value = sampling.get(name)
            if value is not None and not (type(value) is int and 1 <= value <= MAX_SAMPLES):
                refuse(name, value, f"an integer from 1 to {MAX_SAMPLES}")
        for name in INTERNAL:
            if name in sampling:
                refuse(name, sampling[name], "nothing: it is SGLang's own")


def check_prompt(obj: GenerateReqInput, input_ids: list[int] | None, vocab_size: int) -> None:
    """What must hold of one prompt."""
    if input_ids is not None and len(input_ids) == 0 and not obj.session_params and not obj.contains_mm_input():
        refuse("prompt", obj.text if obj.text is not None else input_ids, "one that has at least one token")
    if obj.return_logprob and (obj.top_logprobs_num or 0) > vocab_size:
        refuse("top_logprobs", obj.top_logprobs_num, f"at most the vocabulary's {vocab_size}")
    if obj.return_logprob and obj.logprob_start_len < -1:
        refuse("logprob_start_len", obj.logprob_start_len, "-1, or an integer from 0 to the prompt's tokens")


def check_message(message: TokenizedGenerateReqInput) -> None:
    """Refuse what the scheduler could not decode: it would end, and with it every other request."""
    light = copy.copy(message)
    for name in BULK:
        setattr(light, name, None)
    try:
        msgspec.msgpack.decode(msgspec.msgpack.encode(light), type=type(light))
    except (msgspec.MsgspecError, TypeError, ValueError, OverflowError) as error:
        name, value = _culprit(light)
        refuse(name, value, f"what the scheduler can read ({str(error).split(' - at')[0]})")
    for part in (light.sampling_params, light):
        for name in part.__struct_fields__:
            value = getattr(part, name)
            if isinstance(value, int) and not -INT64 <= value < INT64:
                refuse(name, value, "an integer of 64 bits")


def check_sampling(params, vocab_size: int) -> None:
    """What SGLang's samplers take for granted."""
    if not params.top_k < INT32:
        refuse("top_k", params.top_k, f"-1, or an integer from 1 to {INT32 - 1}")
    for token, bias in (params.logit_bias or {}).items():
        if not abs(bias) <= MAX_BIAS:
            refuse(f"logit_bias of token {token}", bias, f"a number from {-MAX_BIAS:g} to {MAX_BIAS:g}")
    if params.min_new_tokens:  # until then they are looked up in the logits
        for token in params.stop_token_ids or ():
            if not 0 <= token < vocab_size:
                refuse("stop_token_ids", token, f"with min_new_tokens, ids from 0 to {vocab_size - 1}")


def _culprit(message: TokenizedGenerateReqInput) -> tuple[str, Any]:
    """The field that cannot be decoded, by its name."""
    for part in (message.sampling_params, message):
        for field in msgspec.structs.fields(type(part)):
            value = getattr(part, field.name)
            if value is part or field.name == "sampling_params":
                continue
            try:
                msgspec.msgpack.decode(msgspec.msgpack.encode(value), type=field.type)
            except (msgspec.MsgspecError, TypeError, ValueError, OverflowError):
                return field.name, value
    return "request", "a value"
