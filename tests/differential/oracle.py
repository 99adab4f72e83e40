"""Plain SGLang's answer against ours.

At ratio 1, and wherever a request was served uncompressed, all of the JSON must be equal, but for ids, times and
what only we report. With entries dropped: status, prompt tokens, and lengths and finish reasons where they are
fixed. Of what both refuse the status alone.
"""

import json
import math
import re

from tests.differential.servers import WINDOW, Outcome

VOLATILE = {
    "id", "rid", "created", "created_at", "e2e_latency", "response_sent_to_client_ts", "num_retractions", "call_id",
    "previous_response_id", "request_id", "cached_tokens_details", "completed_at",
}  # fmt: skip
# Of a request without output: SGLang has them if another request in its batch has output (``is_prefill_only``).
OUTPUT_LOGPROBS = {
    "output_token_logprobs", "output_token_logprobs_length", "output_top_logprobs", "output_token_ids_logprobs",
}  # fmt: skip
FACTS = {"prompt_tokens", "cached_tokens", "input_tokens", "role", "object", "index", "status", "is_done"}
FIXED_FACTS = FACTS | {"completion_tokens", "output_tokens", "finish_reason", "stop_reason", "total_tokens"}
STOPPERS = {
    "stop", "stop_token_ids", "stop_regex", "stop_sequences", "json_schema", "regex", "ebnf", "response_format",
    "tools", "text", "beam_width",
}  # fmt: skip
SHOWN_ONLY = {"/server_info", "/metrics", "/v1/loads", "/health_generate", "/model_info"}  # status alone
LOGPROB_TOLERANCE = 2e-3
PAGE = 16


def sampling_of(body: dict) -> dict:
    """The fields that say how tokens are chosen."""
    inner = body.get("sampling_params")
    return inner if isinstance(inner, dict) else body


def disturbs(step: dict) -> bool:
    """Whether what happens depends on the moment at which this arrives."""
    return bool({"hang_up", "abort", "then"} & set(step)) or step["path"] in (
        "/flush_cache", "/abort_request", "/open_session", "/close_session", "/update_weights_from_disk",
    ) or "session_params" in step["body"] or step["body"].get("background") is True  # fmt: skip


def is_repeatable(step: dict, plain: Outcome) -> bool:
    """Whether the same request, sent again, has the same answer."""
    changes = {"session_params", "previous_response_id", "background"} & set(step["body"])
    return plain.status == 200 and not disturbs(step) and not changes and step.get("method") != "GET"


def differences(
    step, plain: Outcome, ours: Outcome, keeps_all: bool, is_timing_free: bool, has_twins: bool = True
) -> list[str]:
    """In words, what of our outcome is not as it must be.

    Args:
        keeps_all: of a server at ratio 1.
        is_timing_free: what the trees hold follows from the program alone, so that cached tokens can be compared.
        has_twins: of a server that keeps the raw entries of a first segment beside the compressed ones.
    """
    if step.get("ours_only"):
        return [] if 400 <= ours.status < 500 else [f"HTTP {ours.status}, not refused: {shortened(ours.body)}"]
    if {"hang_up", "abort"} & set(step) or plain.status == 0 or plain.status >= 500:
        return []
    if _refuses_boundary(step, ours):
        return []
    if plain.status != ours.status:
        return [f"HTTP {ours.status}, plain {plain.status}: {shortened(ours.body)}"]
    if plain.status != 200 or step["path"] in SHOWN_ONLY:
        return []  # of two reasons to refuse a request, ours may come first
    volatile = VOLATILE | (OUTPUT_LOGPROBS if sampling_of(ours.sent).get("max_new_tokens") == 0 else set())
    theirs, own = normalized(plain.body, volatile), normalized(ours.body, volatile)
    cached_slack = cached_slack_of(step, ours, has_twins) if is_timing_free else None
    is_same_prompt = plain.sent == ours.sent
    is_raw = is_same_prompt and ours.headers.get("x-metasoft-span-tokens") == "0"
    if is_greedy(ours.sent) and (keeps_all and keeps_every_entry(step, ours.sent) or is_raw):
        return unequal(theirs, own, cached_slack)
    found = facts(theirs, own, is_fixed(ours.sent), cached_slack)
    if is_same_prompt and is_greedy(ours.sent):
        pairs = zip(answers(plain.body), answers(ours.body), strict=False)
        for one, other in pairs:
            if "metasoft_bypass" in other["meta_info"]:
                found += unequal(normalized(one, volatile), normalized(other, volatile), None)
            else:
                found += prompt_logprobs(one["meta_info"], other["meta_info"])
    return found


def cached_slack_of(step: dict, ours: Outcome, has_twins: bool) -> float:
    """By how many tokens ours may find less in the tree than plain SGLang does.

    A window's raw entries are found by those alone who use the prefix before it; who stays raw, has another ratio, or
    leaves the earlier prompt within its window, finds the raw twins of first segments, or nothing.
    """
    is_raw = "x-metasoft-bypass" in ours.headers
    return WINDOW + 2 * PAGE if has_twins and keeps_every_entry(step, ours.sent) and not is_raw else math.inf


def options_of(step: dict, sent: dict) -> set[str]:
    """Which settings of ours the request brings, in its body or in headers."""
    options = sampling_of(sent).get("custom_params")
    names = [*(options if isinstance(options, dict) else ()), *step.get("headers", ())]
    return {name.removeprefix("x-").replace("-", "_") for name in names}


def _refuses_boundary(step: dict, ours: Outcome) -> bool:
    """Whether ours refused, by status or in a stream, a boundary behind the prompt's end, ignored by plain SGLang."""
    return "metasoft_boundary" in options_of(step, ours.sent) and "metasoft_boundary=" in json.dumps(ours.body)


def keeps_every_entry(step: dict, sent: dict) -> bool:
    """Whether the request leaves the server's ratio as it is."""
    return not {"metasoft_ratio", "metasoft_budget"} & options_of(step, sent)


def is_greedy(sent: dict) -> bool:
    """Whether the answer follows from the model alone."""
    sampling = sampling_of(sent)
    return sampling.get("temperature") == 0 or sampling.get("top_k") == 1


def is_fixed(sent: dict) -> bool:
    """Whether the answer's length follows from the request alone."""
    sampling = sampling_of(sent)
    return sampling.get("ignore_eos") is True and not STOPPERS & set(sampling)


def normalized(value, volatile: set[str]):
    """Without what is not the same in two runs of one server."""
    if isinstance(value, dict):
        value = {name: one for name, one in value.items() if name not in volatile and not name.startswith("metasoft_")}
        if "cache_read_input_tokens" in value and isinstance(value.get("input_tokens"), int):
            cached = value.pop("cache_read_input_tokens") or 0
            value |= {"input_tokens": value["input_tokens"] + cached, "cached_tokens": cached}
        return {name: normalized(one, volatile) for name, one in value.items()}
    if isinstance(value, list):
        return [normalized(one, volatile) for one in value]
    if isinstance(value, str):
        return re.sub(r"\b[0-9a-f]{32}\b", "<id>", value)
    return value


def unequal(plain, ours, cached_slack: float | None, path: str = "") -> list[str]:
    """Where two normalized answers differ; numbers that are not whole may by ``LOGPROB_TOLERANCE``.

    Args:
        cached_slack: by how many tokens ours may have found less in the cache; None: do not compare.
    """
    if path.endswith("cached_tokens"):
        if cached_slack is None or not isinstance(plain, int) or not isinstance(ours, int):
            return []
        is_near = plain - cached_slack <= ours <= plain
        return [] if is_near else [f"{path}: {ours}, plain {plain}"]
    if isinstance(plain, dict) and isinstance(ours, dict):
        found = []
        for name in sorted(set(plain) | set(ours)):
            if name == "prompt_tokens_details" or name in plain and name in ours:
                found += unequal(plain.get(name), ours.get(name), cached_slack, f"{path}/{name}")
            else:
                owner = "plain" if name in plain else "ours"
                found.append(f"{path}/{name}: only {owner} has it: {shortened((plain | ours)[name])}")
        return found
    if isinstance(plain, list) and isinstance(ours, list) and len(plain) == len(ours):
        return [
            words
            for n, (a, b) in enumerate(zip(plain, ours, strict=True))
            for words in unequal(a, b, cached_slack, f"{path}/{n}")
        ]
    if isinstance(plain, float) and isinstance(ours, float | int) or isinstance(ours, float) and isinstance(plain, int):
        if math.isclose(plain, ours, abs_tol=LOGPROB_TOLERANCE, rel_tol=1e-3):
            return []
    if "prompt_tokens_details" in path and not (plain and ours):
        return []  # SGLang leaves it out where nothing was cached
    return [] if plain == ours else [f"{path}: {shortened(ours)}, plain {shortened(plain)}"]


def facts(plain, ours, fixed: bool, cached_slack: float | None) -> list[str]:
    """What must agree though entries were dropped."""
    names = FIXED_FACTS if fixed else FACTS
    return unequal(_facts(plain, names), _facts(ours, names), cached_slack)


def _facts(value, names: set[str], path: str = "") -> dict:
    found = {}
    if isinstance(value, dict):
        for name, one in value.items():
            if name in names:
                found[f"{path}/{name}"] = one
            else:
                found |= _facts(one, names, f"{path}/{name}")
    elif isinstance(value, list):
        for number, one in enumerate(value):
            found |= _facts(one, names, f"{path}/{number}")
    return found


def answers(body) -> list[dict]:
    """The answers of ``/generate``, one or several, streamed or not; of other endpoints none."""
    if isinstance(body, dict) and isinstance(body.get("answers"), dict):
        body = [body["answers"][key] for key in sorted(body["answers"])]
    many = body if isinstance(body, list) else [body]
    return [one for one in many if isinstance(one, dict) and isinstance(one.get("meta_info"), dict)]


def prompt_logprobs(plain: dict, ours: dict) -> list[str]:
    """Which prompt tokens have log-probabilities does not depend on what was dropped; values are finite."""
    theirs, own = plain.get("input_token_logprobs"), ours.get("input_token_logprobs")
    if not isinstance(theirs, list) or not isinstance(own, list):
        return (
            [] if type(theirs) is type(own) else [f"input_token_logprobs: {shortened(own)}, plain {shortened(theirs)}"]
        )
    expected, found = [token for _, token, *_ in theirs], [token for _, token, *_ in own]
    return [] if expected == found else [f"input_token_logprobs of {shortened(found)}, plain {shortened(expected)}"]


def answer_text(body) -> str | None:
    """The text of an answer to a conversation, or None."""
    try:
        if "choices" in body:
            choices = body["choices"]
            return choices["0"]["text"] if isinstance(choices, dict) else choices[0]["message"]["content"]
        return body["content"][0]["text"] if "content" in body else body["texts"]["0"]
    except (KeyError, IndexError, TypeError):
        return None


def shortened(value, most: int = 600) -> str:
    """JSON of a value, its middle left out if it is long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"
