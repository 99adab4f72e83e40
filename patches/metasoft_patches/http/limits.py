"""Requests that would end SGLang's scheduler are refused where they enter.

The defects are SGLang's own, with or without this package; docs/security.md has the list.
"""

import copy
from typing import Any

import msgspec
from sglang.srt.environ import envs
from sglang.srt.managers.io_struct import GenerateReqInput, TokenizedGenerateReqInput

from sglang_metasoft.config import shown
from sglang_metasoft.request_options import RequestRefused

MAX_SAMPLES = 1024  # answers to one prompt
MAX_ANSWERS = 1 << 16  # to all prompts of a call that asks for several to each
MAX_LOGPROBS = 1 << 22  # of one prompt, or of its answers: scheduler and tokenizer hold each as objects of Python
FEW_LOGPROBS = 32  # for a token, which answers of any length may ask for
MAX_BIAS = 1e30  # far from where a sum with float32 logits is no number
INT32, INT64 = 2**31, 2**63
# SGLang fills these itself, and takes a request that brings them for one that is done.
INTERNAL = ("is_normalized", "stop_strs", "stop_regex_strs", "stop_str_max_len", "stop_regex_max_len")
# Long, and made by the tokenizer's process itself.
BULK = (
    "input_ids", "input_text", "input_embeds", "mm_inputs", "token_type_ids", "time_stats",
    "positional_embed_overrides",
)  # fmt: skip
# Messages to the scheduler are pickled unless the operator has it otherwise; then these are read as they come.
IS_PICKLED = not hasattr(envs, "SGLANG_USE_PICKLE_IPC") or envs.SGLANG_USE_PICKLE_IPC.get()
AS_THEY_COME = ("custom_params", "multi_item_delimiter_indices")


def refuse(name: str, value: Any, allowed: str) -> None:
    raise RequestRefused(f"{name}: {shown(value)} is not allowed; allowed: {allowed}")


def check_call(obj: GenerateReqInput) -> None:
    """What must be known before the request is spread out into its prompts and samples."""
    params = obj.sampling_params
    prompts = obj.text if obj.text is not None else obj.input_ids if obj.input_ids is not None else obj.input_embeds
    is_batch = isinstance(prompts, list) and len(prompts) > 0 and isinstance(prompts[0], (str, list))
    number = len(prompts) if is_batch else 1
    for sampling in params if isinstance(params, list) else [params]:
        if not isinstance(sampling, dict):
            continue
        for name in ("n", "beam_width"):
            value = sampling.get(name)
            if value is not None and not (type(value) is int and 1 <= value <= MAX_SAMPLES):
                refuse(name, value, f"an integer from 1 to {MAX_SAMPLES}")
        answers = sampling.get("n") or 1
        if answers > 1 and answers * number > MAX_ANSWERS:
            refuse("n", answers, f"at most {MAX_ANSWERS} answers to a call, which has {number} prompts")
        for name in INTERNAL:
            if name in sampling:
                refuse(name, sampling[name], "nothing: it is SGLang's own")


def check_prompt(obj: GenerateReqInput, input_ids: list[int] | None, vocab_size: int) -> None:
    """What must hold of one prompt."""
    if input_ids is not None and len(input_ids) == 0 and not obj.session_params and not obj.contains_mm_input():
        refuse("prompt", obj.text if obj.text is not None else input_ids, "one that has at least one token")
    if (obj.top_logprobs_num or 0) > vocab_size:  # unasked for too: another request of the batch may ask for some
        refuse("top_logprobs", obj.top_logprobs_num, f"at most the vocabulary's {vocab_size}")
    if obj.return_logprob and obj.logprob_start_len < -1:
        refuse("logprob_start_len", obj.logprob_start_len, "-1, or an integer from 0 to the prompt's tokens")
    if obj.return_logprob:
        tokens = len((obj.input_embeds if input_ids is None else input_ids) or ())
        _check_logprobs(obj, tokens, (obj.sampling_params or {}).get("n") or 1)


def _check_logprobs(obj: GenerateReqInput, prompt_tokens: int, answers: int) -> None:
    """How many log-probabilities all answers to a prompt bring with them; the prompt's come all at once."""
    top, ids = obj.top_logprobs_num or 0, obj.token_ids_logprob or ()
    for_each = 1 + top + len(ids)
    name, value = ("top_logprobs", top) if top >= len(ids) else ("token_ids_logprob", f"a list of {len(ids)} ids")
    allowed = "at most {} log-probabilities for each of the {}'s {} tokens"
    start = obj.logprob_start_len
    tokens = max(prompt_tokens - start, 0) * answers if start >= 0 else 0
    if for_each * tokens > MAX_LOGPROBS:
        refuse(name, value, allowed.format(MAX_LOGPROBS // tokens, "prompt", tokens))
    new_tokens = (obj.sampling_params or {}).get("max_new_tokens")
    tokens = (new_tokens if type(new_tokens) is int else 0) * answers
    if for_each > FEW_LOGPROBS and for_each * tokens > MAX_LOGPROBS:
        refuse(name, value, allowed.format(max(MAX_LOGPROBS // tokens, FEW_LOGPROBS), "answer", tokens))


def check_message(message: TokenizedGenerateReqInput) -> None:
    """Refuse values of another type than the scheduler expects: it would end, and with it every other request."""
    light = copy.copy(message)
    light.sampling_params = copy.copy(message.sampling_params)
    for part in (light, light.sampling_params):
        for name in BULK + (AS_THEY_COME if IS_PICKLED else ()):
            if hasattr(part, name):
                setattr(part, name, None)
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
