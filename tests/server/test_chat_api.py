"""Chats through the OpenAI API, on all layers of the model: its answers are text that comes back as the same tokens."""

import re

import pytest
import requests

from tests.server.checks import SOFT_TOKENS
from tests.server.endpoints import ask
from tests.server.test_examples import run

pytestmark = pytest.mark.server

WINDOW = 64


@pytest.fixture(scope="session")
def model_dir(full_model_dir):
    return full_model_dir


@pytest.fixture(scope="module")
def server(start_server):
    return start_server(*SOFT_TOKENS, "--metasoft-min-tokens", "256", "--enable-cache-report")


def test_the_second_turn_of_a_chat_computes_only_new_tokens(server, document):
    messages = [{"role": "user", "content": document[4000:11000] + "\nWho speaks?"}]
    first = server.chat(messages, return_meta_info=True)
    prompt_tokens = first["usage"]["prompt_tokens"]
    meta = first["choices"][0]["meta_info"]
    assert meta["metasoft_span_tokens"] == prompt_tokens - WINDOW
    messages += [first["choices"][0]["message"] | {"tool_calls": None}, {"role": "user", "content": "To whom?"}]
    second = server.chat(messages, return_meta_info=True)
    meta = second["choices"][0]["meta_info"]
    assert meta["metasoft_reused_tokens"] == prompt_tokens - WINDOW
    new_tokens = second["usage"]["prompt_tokens"] - prompt_tokens - first["usage"]["completion_tokens"]
    # The last output token and template tokens around it are not cached by any SGLang.
    assert second["usage"]["prompt_tokens"] - meta["cached_tokens"] <= new_tokens + 2
    assert second["usage"]["prompt_tokens"] > meta["cached_tokens"] > prompt_tokens


def test_the_streamed_example_says_what_its_chat_holds(server):
    out = run("chat_over_document.py", "--url", server.url, "--ratio", "8")
    pattern = r"(\d+) prompt tokens in (\d+) KV entries, (\d+) tokens from"
    tokens, entries, reused = map(int, re.search(pattern, out).groups())
    assert tokens > reused > 4000 and entries < tokens / 6, out


# -- settings and outcome in headers, on every endpoint --------------------------------------------------------------

ENDPOINTS = ("/generate", "/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/responses")
every_endpoint = pytest.mark.parametrize("path", ENDPOINTS)
streamed_or_not = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


@every_endpoint
def test_headers_choose_the_compression_and_tell_it(server, document, path):
    text = f"{path} " + document[20_000:22_500]
    first = ask(server, path, text, stream=True, headers={"x-metasoft-ratio": "3"})
    length, report = first.prompt_tokens, first.headers
    assert first.status == 200 and first.cached_tokens < WINDOW
    assert report == {"span-tokens": length - WINDOW, "kv-tokens": -(-length // 3), "reused-tokens": 0}
    again = ask(server, path, text, stream=False, headers={"x-metasoft-ratio": "3"})
    assert again.headers == report | {"reused-tokens": length - WINDOW}
    assert again.prompt_tokens == length and length - WINDOW <= again.cached_tokens < length
    if path == "/generate":
        assert {name: again.meta[f"metasoft_{name.replace('-', '_')}"] for name in report} == again.headers
    raw = ask(server, path, text, stream=True, headers={"x-metasoft-budget": "1"})
    assert raw.headers["bypass"] == "opted_out" and raw.headers["kv-tokens"] == length
    short = ask(server, path, f"Hello {path}", stream=False)
    assert short.headers["bypass"] == "too_short" and short.headers["kv-tokens"] == short.prompt_tokens


BAD = {
    "value": ({"x-metasoft-ratio": "0.5"}, {}, "header x-metasoft-ratio: '0.5' is not allowed; allowed: a number >= 1"),
    "name": ({"x-metasoft-window": "9"}, {}, "unknown header 'x-metasoft-window'; allowed: x-metasoft-ratio"),
    "beyond the prompt": ({"x-metasoft-boundary": "9000"}, {}, "metasoft_boundary=9000 is not allowed; allowed: "),
    "misplaced": ({}, {"metasoft_ratio": 4}, "'metasoft_ratio' is not read where the body has it; allowed: the header"),
    "in metadata": (
        {},
        {"metadata": {"metasoft_x": 4}},
        "'metasoft_x' is not read where the body has it; allowed: the",
    ),
    "conflict": ({"x-metasoft-ratio": "4"}, {"custom_params": {"metasoft_ratio": 8}}, "metasoft_ratio"),
    "in custom_params": ({}, {"custom_params": {"metasoft_ratio": 0}}, "metasoft_ratio"),
}


@every_endpoint
@streamed_or_not
@pytest.mark.parametrize("what", BAD)
def test_a_bad_setting_is_http_400_in_the_endpoints_own_shape(server, path, stream, what):
    headers, fields, words = BAD[what]
    answer = ask(server, path, "Hello", stream=stream, headers=headers, **fields)
    error = answer.body if path in ENDPOINTS[1:3] else answer.body["error"]
    assert answer.status == 400 and words in error["message"] and "allowed: " in error["message"]
    assert not answer.headers
    if path == "/v1/messages":
        assert answer.body["type"] == "error" and error["type"] == "invalid_request_error"
    elif path != "/generate":
        assert error["code"] == 400


BAD_PARAMS = {
    "metasoft_ratio=0 is not allowed; allowed: a number >= 1": {"metasoft_ratio": 0},
    "metasoft_budget='many' is not allowed; allowed: an integer >= 1": {"metasoft_budget": "many"},
    "unknown key 'metasoft_window'; allowed: metasoft_ratio": {"metasoft_window": 9},
}


@pytest.mark.parametrize("path", ENDPOINTS[1:3])
@pytest.mark.parametrize("words", BAD_PARAMS)
def test_custom_params_out_of_range_are_named_with_what_is_allowed(server, path, words):
    answer = ask(server, path, "Hello", stream=False, custom_params=BAD_PARAMS[words])
    assert answer.status == 400 and words in answer.body["message"]


def test_several_prompts_are_told_as_their_sum_and_not_in_a_stream(server, document):
    texts = ["sum " + document[30_000:32_000], "short one"]
    sampling = {"max_new_tokens": 2, "n": 2}
    body = {"text": texts, "sampling_params": sampling}
    response = requests.post(f"{server.url}/generate", json=body, headers={"x-metasoft-ratio": "4"}, timeout=300)
    metas = [each["meta_info"] for each in response.json()]
    assert len(metas) == 4
    for field in ("span_tokens", "kv_tokens"):
        header = f"x-metasoft-{field.replace('_', '-')}"
        assert int(response.headers[header]) == sum(meta[f"metasoft_{field}"] for meta in metas[::2])
    assert response.headers["x-metasoft-bypass"] == "too_short"
    response = requests.post(f"{server.url}/generate", json=body | {"stream": True}, timeout=300)
    assert response.status_code == 200 and not [name for name in response.headers if "metasoft" in name.lower()]


# -- usage, turn by turn ---------------------------------------------------------------------------------------------

CHATS = ENDPOINTS[2:]


def ask_turn(server, path, messages, stream, **fields):
    """One turn of a greedy chat, with the history in the request."""
    given = {"input": messages} if path == "/v1/responses" else {"messages": messages, "max_tokens": 16}
    return ask(server, path, "", stream=stream, temperature=0, **given, **fields)


@pytest.fixture(scope="module")
def two_turns(server, document):
    """The messages of a chat's second turn, with what the model really answered to the first."""
    messages = [{"role": "user", "content": document[9_000:13_000] + "\nWho speaks?"}]
    answer = server.chat(messages, max_tokens=16)["choices"][0]["message"]["content"]
    return [*messages, {"role": "assistant", "content": answer}, {"role": "user", "content": "To whom?"}]


@pytest.fixture(scope="module")
def chat_usage(server, two_turns):
    """What ``/v1/chat/completions`` counts, whole."""
    return usage_by_turn(server, CHATS[0], two_turns, stream=False)


def usage_by_turn(server, path, messages, stream):
    """Prompt, cached and reused tokens of both turns, from an empty cache."""
    requests.post(f"{server.url}/flush_cache", timeout=60).raise_for_status()
    turns = [ask_turn(server, path, messages[:end], stream) for end in (1, 3)]
    assert [turn.status for turn in turns] == [200, 200]
    return [(turn.prompt_tokens, turn.cached_tokens, turn.headers["reused-tokens"]) for turn in turns]


@streamed_or_not
@pytest.mark.parametrize("path", CHATS)
def test_a_second_turn_counts_cached_raw_tokens_alike_in_every_api(server, two_turns, chat_usage, path, stream):
    usage = usage_by_turn(server, path, two_turns, stream)
    (prompt, cached, reused), (longer, cached_again, reused_again) = usage
    assert (cached, reused, reused_again) == (0, 0, prompt - WINDOW)
    # The whole first prompt, far more than the entries that it holds, and most of the answer; not the next question.
    assert prompt <= cached_again < longer and usage == chat_usage


# -- requests that would end the scheduler ---------------------------------------------------------------------------


def sampling(**params):
    return {"sampling_params": {"max_new_tokens": 2, **params}}


MANY, VOCABULARY = 1_000_000, 49_152
ENDING = [
    ("/generate", {"text": ""}, "prompt: '' is not allowed; allowed: one that has at least one token"),
    ("/generate", {"text": ["a", ""]}, "prompt: '' is not allowed"),
    ("/generate", {"text": None, "input_ids": [[5], []]}, "prompt: [] is not allowed"),
    ("/v1/completions", {"prompt": ["a", ""]}, "prompt: '' is not allowed"),
    ("/generate", {"return_logprob": True, "top_logprobs_num": MANY}, f"{MANY} is not allowed; allowed: at most"),
    ("/generate", {"return_logprob": True, "top_logprobs_num": VOCABULARY + 1}, f"the vocabulary's {VOCABULARY}"),
    ("/generate", {"text": ["a", "b"], "return_logprob": True, "top_logprobs_num": [1, MANY]}, "top_logprobs: 1000000"),
    ("/v1/completions", {"logprobs": MANY}, "top_logprobs: 1000000 is not allowed"),
    ("/v1/chat/completions", {"logprobs": True, "top_logprobs": MANY}, "top_logprobs: 1000000 is not allowed"),
    ("/generate", sampling(n=MANY), "n: 1000000 is not allowed; allowed: an integer from 1 to 1024"),
    ("/v1/chat/completions", {"n": 0}, "n: 0 is not allowed"),
    ("/generate", sampling(beam_width=MANY), "beam_width: 1000000 is not allowed"),
    ("/v1/chat/completions", {"top_k": 2**31}, f"top_k: {2**31} is not allowed; allowed: -1, or an integer from 1"),
    ("/v1/chat/completions", {"logit_bias": {"5": 1e39}}, "logit_bias of token 5: 1e+39 is not allowed"),
    ("/generate", sampling(min_new_tokens=1, stop_token_ids=[VOCABULARY]), f"stop_token_ids: {VOCABULARY} is"),
    ("/generate", {"return_logprob": True, "logprob_start_len": -5}, "logprob_start_len: -5 is not allowed"),
]  # fmt: skip


@streamed_or_not
@pytest.mark.parametrize(("path", "fields", "words"), ENDING, ids=[f"{path} {words[:24]}" for path, _, words in ENDING])
def test_a_request_that_would_end_the_scheduler_is_http_400(server, path, stream, fields, words):
    answer = ask(server, path, "Hello", stream=stream, **fields)
    error = answer.body if path in ENDPOINTS[1:3] else answer.body["error"]
    assert answer.status == 400 and words in error["message"] and "allowed: " in error["message"]
    assert ask(server, "/generate", "Hello", stream=False).status == 200


def test_what_is_just_inside_the_limits_is_served(server):
    logprobs = {"return_logprob": True, "top_logprobs_num": VOCABULARY}
    params = sampling(top_k=2**31 - 1, stop_token_ids=[VOCABULARY], logit_bias={"5": -1e30}, max_new_tokens=1)
    assert ask(server, "/generate", "Hello", stream=False, **logprobs, **params).status == 200
    assert ask(server, "/v1/chat/completions", "", stream=False).status == 200  # the template gives it tokens
    nested = {"custom_params": {"a": {"b": {"c": 1}}}}
    assert ask(server, "/v1/completions", "Hello", stream=False, **nested).status == 200
