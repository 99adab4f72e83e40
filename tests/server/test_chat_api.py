"""Chats through the OpenAI API, on all layers of the model: its answers are text that comes back as the same tokens."""

import re

import pytest

from tests.server.test_examples import run

pytestmark = pytest.mark.server

WINDOW = 64


@pytest.fixture(scope="session")
def model_dir(full_model_dir):
    return full_model_dir


@pytest.fixture(scope="module")
def server(start_server):
    return start_server("--enable-metasoft")


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
