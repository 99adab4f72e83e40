"""One server with default settings: reporting, sharing, isolation, streaming, aborts, errors; and no leak after all."""

import json
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from sglang_metasoft.config import settings_of
from tests.server.checks import SALT, SOFT_TOKENS, STRICT_CHECKS, assert_pool_is_whole, metasoft, wait_until_idle

pytestmark = pytest.mark.server

POOL_TOKENS = 16384
WINDOW, MIN_TOKENS = 64, 512


@pytest.fixture(scope="module")
def server(start_server):
    flags = [*SOFT_TOKENS, "--enable-metrics", "--max-total-tokens", str(POOL_TOKENS)]
    return start_server(*flags, env=STRICT_CHECKS)


def test_start_up_says_what_is_active(server):
    lines = [line for line in server.log.read_text().splitlines() if "MetaSoft is active" in line]
    assert len(lines) == 1 and "ratio=4.0" in lines[0] and "untrained" in lines[0]


def test_server_info_shows_what_is_active_and_every_setting(server):
    shown = server.info()["internal_states"][0]["metasoft"]
    defaults = {name: field.default for name, field in settings_of().items()}
    assert {name: shown[name] for name in defaults} == defaults | {"method": "metasoft"}
    assert shown["compressor"] == {"kind": "untrained", "path": None, "kept": None, "limit_ratio": None}
    assert "untrained" in shown["active"] and shown["runs_on"] == "torch" and "secret" not in shown


def test_counts_are_logical_and_the_same_prompt_again_reuses_the_prefix(server, document_ids):
    for cached, reused in ((0, 0), (1599, 1600 - WINDOW)):
        response = server.generate(document_ids[:1600], **{SALT: "counts"})
        assert response["meta_info"]["prompt_tokens"] == 1600 and response["meta_info"]["cached_tokens"] == cached
        assert metasoft(response) == {"span_tokens": 1600 - WINDOW, "kv_tokens": 400, "reused_tokens": reused}


def test_two_questions_share_the_raw_document(server, document_ids):
    """Questions longer than the window: the second finds the raw document, and a segment ends where they part."""
    shared, questions = document_ids[1000:2400], (document_ids[2400:2500], document_ids[2600:2700])
    first = server.generate(shared + questions[0])
    second = server.generate(shared + questions[1])
    assert first["meta_info"]["cached_tokens"] < 100
    assert len(shared) - 1 <= second["meta_info"]["cached_tokens"] <= len(shared) + 5
    assert metasoft(second)["reused_tokens"] == 0
    assert metasoft(first)["span_tokens"] == 1500 - WINDOW
    assert len(shared) <= metasoft(second)["span_tokens"] <= len(shared) + 5


@pytest.mark.parametrize(
    "other",
    [{"extra_key": "b"}, {SALT: "pepper"}, {"custom_params": {"metasoft_ratio": 2}}],
    ids=lambda other: next(iter(other)),
)
def test_nothing_is_shared_across(server, document_ids, other):
    ids = document_ids[300:1500] if "custom_params" in other else document_ids[310:1510]
    server.generate(ids)
    assert metasoft(server.generate(ids))["reused_tokens"] > 0
    response = server.generate(ids, **other)
    assert metasoft(response)["reused_tokens"] == 0
    if "custom_params" not in other:
        assert response["meta_info"]["cached_tokens"] == 0
    assert metasoft(server.generate(ids, **other))["reused_tokens"] > 0


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"custom_params": {"metasoft_ratio": 1}}, "opted_out"),
        ({"custom_params": {"metasoft_budget": 1}}, "opted_out"),
        ({"custom_params": {"metasoft_budget": 4000}}, "nothing_to_drop"),
        ({"return_logprob": True, "logprob_start_len": 0}, "prompt_logprobs"),
    ],
)
def test_a_request_that_cannot_be_compressed_says_why(server, document_ids, fields, reason):
    response = server.generate(document_ids[777:1577], **fields)
    assert metasoft(response) == {
        "span_tokens": 0, "kv_tokens": 800, "reused_tokens": 0, "bypass": reason,
    }  # fmt: skip


def test_a_short_prompt_stays_raw(server, document_ids):
    response = server.generate(document_ids[: MIN_TOKENS + WINDOW - 1], **{SALT: "short"})
    assert metasoft(response)["bypass"] == "too_short"


def test_budget_and_ratio_per_request(server, document_ids):
    ids = document_ids[50:1650]
    assert metasoft(server.generate(ids, custom_params={"metasoft_ratio": 8}))["kv_tokens"] == 200
    assert metasoft(server.generate(ids, custom_params={"metasoft_budget": 333}))["kv_tokens"] == 333


@pytest.mark.parametrize("boundary", ["named", "seen"])
def test_a_budget_at_a_boundary_is_what_the_prompt_holds(server, document_ids, boundary):
    """863 tokens, 7 of them after the boundary: those and 93 entries, since no window is held back besides."""
    document, question, salt = document_ids[70:926], document_ids[3000:3007], {SALT: f"budget {boundary}"}
    options = {"metasoft_budget": 100}
    if boundary == "named":
        options["metasoft_boundary"] = len(document)
    else:
        server.generate(document + document_ids[2000:2090], **salt)
    response = server.generate(document + question, custom_params=options, **salt)
    assert response["meta_info"]["prompt_tokens"] == 863
    assert metasoft(response) == {"span_tokens": 856, "kv_tokens": 100, "reused_tokens": 0}
    again = server.generate(document + document_ids[3500:3507], custom_params={"metasoft_budget": 100}, **salt)
    assert metasoft(again) == {"span_tokens": 856, "kv_tokens": 100, "reused_tokens": 856}


@pytest.mark.parametrize(
    "params",
    [{"metasoft_ratio": 0.5}, {"metasoft_ratio": "x"}, {"metasoft_budget": 0}, {"metasoft_colour": 1}],
    ids=json.dumps,
)
def test_an_invalid_value_is_http_400_and_named(server, params):
    messages = [{"role": "user", "content": "Hi"}]
    for path, body in (
        ("/generate", {"text": "Hi", "sampling_params": {"custom_params": params}}),
        ("/v1/chat/completions", {"model": "m", "messages": messages, "custom_params": params}),
    ):
        response = requests.post(server.url + path, json=body, timeout=60)
        assert response.status_code == 400, response.text
        assert next(iter(params)) in response.text and "allowed" in response.text


def test_output_logprobs_work_on_first_run_and_on_reuse(server, document_ids):
    ids = document_ids[1200:2200]
    for _ in range(2):
        response = server.generate(ids, 4, return_logprob=True)
        logprobs = response["meta_info"]["output_token_logprobs"]
        assert [token for _, token, _ in logprobs] == response["output_ids"]
        assert metasoft(response)["span_tokens"] == 1000 - WINDOW


def test_prompt_logprobs_inside_the_window_do_not_stop_compression(server, document_ids):
    ids = document_ids[1300:2300]
    for _ in range(2):
        response = server.generate(ids, 4, return_logprob=True, logprob_start_len=980)
        tokens = [token for _, token, _ in response["meta_info"]["input_token_logprobs"]]
        assert tokens == ids[980:] and metasoft(response)["span_tokens"] == 1000 - WINDOW


def test_streaming_gives_the_same_tokens_and_flat_fields(server, document_ids):
    ids = document_ids[150:1150]
    server.generate(ids)  # the prefix is there, so that both runs below take the same path
    whole = server.generate(ids, 12)
    body = {"input_ids": ids, "stream": True, "sampling_params": {"temperature": 0, "max_new_tokens": 12}}
    with requests.post(f"{server.url}/generate", json=body, stream=True, timeout=120) as response:
        events = [line[6:] for line in response.iter_lines() if line.startswith(b"data: ")]
    assert events[-1] == b"[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert chunks[-1]["text"] == whole["text"] and len(chunks) > 3
    assert all(metasoft(chunk) == metasoft(whole) for chunk in chunks)


def test_concurrent_requests_are_all_compressed(server, document_ids):
    prompts = [document_ids[n * 90 : n * 90 + 900 + 40 * n] for n in range(6)]
    with ThreadPoolExecutor(6) as pool:
        responses = list(pool.map(server.generate, prompts))
    for ids, response in zip(prompts, responses, strict=True):
        assert metasoft(response)["kv_tokens"] == -(-len(ids) // 4)


def test_an_aborted_request_leaves_the_server_well(server, document_ids):
    """Aborted while it decodes: it ends at once, says so, and what it left behind serves the next one like it."""
    sampling = {"max_new_tokens": 3000, "ignore_eos": True}
    body = {"input_ids": document_ids[500:2000], "rid": "abort-me", "stream": True, "sampling_params": sampling}
    with requests.post(f"{server.url}/generate", json=body, stream=True, timeout=120) as response:
        events = (line[6:] for line in response.iter_lines() if line.startswith(b"data: {"))
        next(events)
        requests.post(f"{server.url}/abort_request", json={"rid": "abort-me"}, timeout=60)
        *_, last = map(json.loads, events)
    assert last["meta_info"]["finish_reason"]["type"] == "abort" and last["meta_info"]["completion_tokens"] < 3000
    again = metasoft(server.generate(document_ids[500:2000]))
    assert again["span_tokens"] == again["reused_tokens"] == 1500 - WINDOW


def test_flush_cache_forgets_prefixes(server, document_ids):
    ids = document_ids[1500:2500]
    server.generate(ids)
    wait_until_idle(server)
    assert requests.post(f"{server.url}/flush_cache", timeout=60).status_code == 200
    assert metasoft(server.generate(ids))["reused_tokens"] == 0


def test_nothing_leaks_over_200_mixed_requests(server, document_ids):
    salt = {SALT: "mixed"}

    def one(number: int) -> None:
        random_source = random.Random(f"5-{number}")  # of this one alone: threads take turns as they like
        kind = random_source.random()
        start, length = random_source.randrange(8) * 300, random_source.choice([40, 300, 700, 900, 1300])
        ids = document_ids[start : start + length]
        params = random_source.choice([{}, {}, {"metasoft_ratio": 1}, {"metasoft_ratio": 8}, {"metasoft_budget": 128}])
        if kind < 0.15:
            body = {"input_ids": ids, "rid": f"mixed-{number}", "sampling_params": {"max_new_tokens": 400}} | salt
            sender = threading.Thread(target=lambda: requests.post(f"{server.url}/generate", json=body, timeout=300))
            sender.start()
            time.sleep(random_source.random() * 2)
            requests.post(f"{server.url}/abort_request", json={"rid": f"mixed-{number}"}, timeout=60)
            sender.join()
        elif kind < 0.3:
            first = server.generate(ids, 5, custom_params=params, **salt)
            server.generate(ids + first["output_ids"] + document_ids[:30], 5, custom_params=params, **salt)
        else:
            server.generate(ids, random_source.randrange(1, 8), custom_params=params, **salt)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(one, range(200)))
    assert_pool_is_whole(server, POOL_TOKENS)
