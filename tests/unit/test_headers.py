"""Settings and outcome in HTTP headers: what is read, what is refused, and when a response's headers are sent."""

import asyncio
import json

import pytest
from metasoft_patches.http.headers import MAX_HELD, SCOPE_KEY, Exchange, HeaderMiddleware, read_headers

from sglang_metasoft.request_options import RequestRefused

FIELDS = {"metasoft_span_tokens": 800, "metasoft_kv_tokens": 264, "metasoft_reused_tokens": 0}
BYPASSED = FIELDS | {"metasoft_span_tokens": 0, "metasoft_bypass": "too_short"}


def as_headers(given):
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in given]


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ([], {}),
        ([("x-metasoft-ratio", "8")], {"ratio": 8}),
        ([("X-Metasoft-Ratio", "1e1")], {"ratio": 10.0}),
        ([("x-metasoft-budget", "300"), ("x-metasoft-boundary", "77")], {"budget": 300, "boundary": 77}),
        ([("x-metasof-ratio", "8"), ("accept", "*/*")], {}),
    ],
)
def test_settings_are_read(given, options):
    assert read_headers(as_headers(given)) == options


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([("x-metasoft-ratio", "four")], "header x-metasoft-ratio: 'four' is not allowed; allowed: a number >= 1"),
        ([("x-metasoft-ratio", "NaN")], "'NaN' is not allowed"),
        ([("x-metasoft-ratio", "true")], "'true' is not allowed"),
        ([("x-metasoft-ratio", "")], "'' is not allowed"),
        ([("x-metasoft-ratio", "null")], "'null' is not allowed"),
        ([("x-metasoft-ratio", "[" * 60_000)], r"\[\.\.\. is not allowed"),
        ([("x-metasoft-budget", "1e3")], "'1e3' is not allowed; allowed: an integer >= 1"),
        ([("x-metasoft-budget", "9" * 5000)], r"9\.\.\. is not allowed"),
        ([("x-metasoft-boundary", "0")], "'0' is not allowed; allowed: an integer >= 1, less than"),
        ([("x-metasoft-window", "8")], "unknown header 'x-metasoft-window'; allowed: x-metasoft-ratio, "),
        ([("x-metasoft-ratio", "4"), ("x-metasoft-ratio", "4")], "header x-metasoft-ratio is given twice; allowed: "),
        ([("x-metasoft-ratio", "4"), ("x-metasoft-budget", "9")], "are both given; allowed: one of them"),
    ],
)
def test_a_bad_header_is_named_with_the_allowed_values(given, words):
    with pytest.raises(RequestRefused, match=words):
        read_headers(as_headers(given))


def test_a_header_joins_the_body_but_never_overrules_it():
    assert Exchange({"ratio": 8}).merge({"thinking_budget": 5}) == {"thinking_budget": 5, "metasoft_ratio": 8}
    assert Exchange({"ratio": 8}).merge({"metasoft_ratio": 8.0}) == {"metasoft_ratio": 8.0}
    assert Exchange({}).merge(None) is None
    with pytest.raises(RequestRefused, match="x-metasoft-ratio: 8 and custom_params metasoft_ratio=4 are both given"):
        Exchange({"ratio": 8}).merge({"metasoft_ratio": 4})


def test_the_outcome_of_several_prompts_is_their_sum_and_their_reasons():
    exchange = Exchange({})
    exchange.report([FIELDS, BYPASSED, BYPASSED | {"metasoft_bypass": "lora"}])
    assert dict(exchange.headers) == {
        b"x-metasoft-span-tokens": b"800", b"x-metasoft-kv-tokens": b"792", b"x-metasoft-reused-tokens": b"0",
        b"x-metasoft-bypass": b"lora, too_short",
    }  # fmt: skip


# -- the middleware --------------------------------------------------------------------------------------------------


def serve(steps, path="/v1/messages", headers=(), method="POST", root_path=""):
    """What a client sees of an application that takes ``steps``: messages to send, or deeds to an exchange.

    Returns:
        The messages, and for each step how many of them the client had after it.
    """
    sent, counts = [], []

    async def send(message):
        sent.append(message)

    async def app(scope, receive, send):
        for step in steps:
            await send(step) if isinstance(step, dict) else step(scope[SCOPE_KEY])
            counts.append(len(sent))

    scope = {"type": "http", "method": method, "path": root_path + path, "root_path": root_path}
    asyncio.run(HeaderMiddleware(app)({**scope, "headers": as_headers(headers)}, None, send))
    return sent, counts


START = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}


def body(text, more_body=True):
    return {"type": "http.response.body", "body": text, "more_body": more_body}


def outcome(exchange):
    exchange.report([FIELDS])


def refuse(exchange):
    exchange.refusal = "no"


def test_a_stream_starts_with_its_first_token_and_has_the_outcome():
    """Lifecycle events before it wait; what follows the first token is never held."""
    steps = [START, body(b"created"), outcome, body(b"token"), body(b"more"), body(b"", False)]
    sent, counts = serve(steps)
    assert counts == [0, 0, 0, 3, 4, 5]
    assert sent[0]["headers"][0] == START["headers"][0] and (b"x-metasoft-kv-tokens", b"264") in sent[0]["headers"]
    assert [message["body"] for message in sent[1:]] == [b"created", b"token", b"more", b""]
    assert START["headers"] == [(b"content-type", b"text/event-stream")]


def test_a_response_without_an_outcome_is_passed_on_whole():
    sent, _ = serve([START, body(b"{}", False)])
    assert sent == [START, body(b"{}", False)]
    steps = [START, *[body(b"tick")] * 30, body(b"", False)]
    sent, counts = serve(steps)
    assert sent == steps and counts[MAX_HELD - 1] == MAX_HELD


def test_the_outcome_counts_until_the_headers_are_sent():
    sent, _ = serve([outcome, START, lambda exchange: exchange.report([BYPASSED]), body(b"{}", False)])
    assert (b"x-metasoft-span-tokens", b"800") in sent[0]["headers"]


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("/generate", {"error": {"message": "no"}}),
        ("/v1/completions", {"object": "error", "message": "no", "type": "BadRequest", "param": None, "code": 400}),
        ("/v1/messages", {"type": "error", "error": {"type": "invalid_request_error", "message": "no"}}),
        (
            "/v1/responses",
            {"error": {"message": "no", "type": "invalid_request_error", "param": None, "code": 400}},
        ),
    ],
)
def test_a_refusal_is_http_400_in_the_endpoints_words_even_in_a_stream(path, error):
    sent, _ = serve([START, refuse, body(b"event: error"), body(b"[DONE]", False)], path, root_path="/api")
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert sent[0]["status"] == 400 and json.loads(sent[1]["body"]) == error
    sent, _ = serve([refuse, START | {"status": 400}, body(b"{}", False)], path)
    assert sent[0]["status"] == 400 and json.loads(sent[1]["body"]) == error and len(sent) == 2


def test_a_bad_header_never_reaches_the_application():
    sent, counts = serve([START], headers=[("x-metasoft-ratio", "0")])
    assert sent[0]["status"] == 400 and not counts
    assert serve([START], headers=[("x-metasoft-ratio", "0")], method="GET")[0] == [START]
