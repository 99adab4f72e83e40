"""Prompts longer than the KV pool, compressed chunk by chunk."""

import json
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import requests

from tests.server.checks import (
    SOFT_TOKENS,
    STRICT_CHECKS,
    assert_pool_is_whole,
    assert_sound_after_all,
    inside_env,
    inside_lines,
    metasoft,
)

pytestmark = pytest.mark.server

POOL_TOKENS, CHUNK, RATIO = 2560, 256, 8
FLAGS = [
    *SOFT_TOKENS, "--metasoft-during-prefill", "--metasoft-min-tokens", "128", "--metasoft-ratio", str(RATIO),
    "--chunked-prefill-size", str(CHUNK), "--enable-metrics", "--max-total-tokens", str(POOL_TOKENS),
]  # fmt: skip


@pytest.fixture(scope="module")
def server(start_server):
    return start_server(*FLAGS, env=STRICT_CHECKS)


@pytest.fixture(scope="module")
def long_ids(document_ids):
    return (document_ids + document_ids)[: 3 * POOL_TOKENS]


def test_a_prompt_of_three_times_the_pool_is_served_and_continued(server, long_ids, document_ids):
    first = server.generate(long_ids, 12)
    assert first["meta_info"]["prompt_tokens"] == 3 * POOL_TOKENS
    assert metasoft(first)["kv_tokens"] <= 3 * POOL_TOKENS / RATIO + 64 + 128 + 16
    turn = long_ids + first["output_ids"] + document_ids[:40]
    second = server.generate(turn, 12)
    assert metasoft(second)["reused_tokens"] >= metasoft(first)["span_tokens"]
    assert second["meta_info"]["prompt_tokens"] - second["meta_info"]["cached_tokens"] <= 41


def test_several_at_once_share_the_pool(server, long_ids):
    prompts = [long_ids[n * 50 :][:4000] for n in range(1, 5)] + [long_ids[:300]]
    with ThreadPoolExecutor(len(prompts)) as pool:
        responses = list(pool.map(lambda ids: server.generate(ids, 30, sampling_params={"ignore_eos": True}), prompts))
    for ids, response in zip(prompts, responses, strict=True):
        assert response["meta_info"]["prompt_tokens"] == len(ids)
        assert response["meta_info"]["completion_tokens"] == 30
    assert all(metasoft(response)["kv_tokens"] < 800 for response in responses)
    assert_pool_is_whole(server, POOL_TOKENS)


def test_a_raw_prefix_that_nearly_fills_the_pool_is_no_hindrance(server, long_ids):
    ids = long_ids[777:]
    raw = server.generate(ids[: POOL_TOKENS - 200], 4, custom_params={"metasoft_ratio": 1})
    assert metasoft(raw)["bypass"] == "opted_out"
    response = server.generate(ids[:6000], 4)
    assert metasoft(response)["kv_tokens"] < 6000 / RATIO + 64 + 128 + 16
    assert_pool_is_whole(server, POOL_TOKENS)


@pytest.mark.parametrize(
    "fields",
    [
        {"custom_params": {"metasoft_ratio": 1}},
        {"custom_params": {"metasoft_ratio": 2}},
        {"return_logprob": True, "logprob_start_len": 0},
    ],
    ids=["opted-out", "ratio-too-low", "prompt-logprobs"],
)
def test_a_prompt_that_does_not_fit_even_so_is_refused(server, long_ids, fields):
    sampling = {"max_new_tokens": 4, "custom_params": fields.get("custom_params")}
    body = {"input_ids": long_ids, "sampling_params": sampling} | fields
    body.pop("custom_params", None)
    refused = requests.post(f"{server.url}/generate", json=body, timeout=60)
    assert refused.status_code == 400 and "exceeds the maximum allowed length" in refused.text, refused.text


def test_the_output_is_held_to_what_the_compressed_prompt_leaves(server, long_ids):
    options = {"sampling_params": {"ignore_eos": True}, "custom_params": {"metasoft_ratio": 3}}
    response = server.generate(long_ids[:6000], 2000, **options)
    held = metasoft(response)["kv_tokens"] + response["meta_info"]["completion_tokens"]
    assert POOL_TOKENS * 0.8 < held <= POOL_TOKENS
    assert response["meta_info"]["finish_reason"]["type"] == "length"
    assert_pool_is_whole(server, POOL_TOKENS)


# Of the last attempt: where it starts again beside the others, it may find no slots before the fault strikes.
REASONS = ("fault", "no_free_slots")


@pytest.fixture(scope="module")
def faulty_server(start_server):
    """A request named ``inside-probe...`` is never compressed, though it was let in at its compressed size."""
    return start_server(*FLAGS, "--page-size", "16", env=inside_env())


@pytest.mark.parametrize(("prompt_tokens", "is_served"), [(2200, True), (4000, False)], ids=["fits-raw", "too-long"])
def test_a_prompt_that_stays_raw_halfway_waits_for_others(faulty_server, document_ids, prompt_tokens, is_served):
    """Its chunks no longer fit beside what decodes; it costs neither the server nor any of those."""
    decoding = Barrier(6)  # gauges are written too seldom to be asked

    def decode(ids: list[int]) -> int:
        """Stream 320 tokens; returns how many came."""
        body = {
            "input_ids": ids, "stream": True, "sampling_params": {"max_new_tokens": 320, "ignore_eos": True},
        }  # fmt: skip
        with requests.post(f"{faulty_server.url}/generate", json=body, stream=True, timeout=300) as stream:
            lines = (line.removeprefix(b"data: ") for line in stream.iter_lines() if line)
            next(lines)
            decoding.wait(120)
            *_, last, _ = lines  # [DONE] ends it
        return json.loads(last)["meta_info"]["completion_tokens"]

    with ThreadPoolExecutor(5) as pool:
        others = [pool.submit(decode, document_ids[n * 70 : n * 70 + 60]) for n in range(5)]
        decoding.wait(120)
        body = {
            "input_ids": document_ids[:prompt_tokens],
            "rid": f"inside-probe-{prompt_tokens}",
            "sampling_params": {"max_new_tokens": 8, "ignore_eos": True},
        }
        response = requests.post(f"{faulty_server.url}/generate", json=body, timeout=300)
        assert [other.result() for other in others] == [320] * 5
    if is_served:
        assert response.status_code == 200, response.text
        assert metasoft(response.json())["bypass"] in REASONS
        assert response.json()["meta_info"]["completion_tokens"] == 8
    else:
        assert response.status_code == 503, response.text
        assert any(f"could not be compressed ({reason})" in response.text for reason in REASONS), response.text
    assert inside_lines(faulty_server, "fault"), "no fault was injected"
    assert_sound_after_all(faulty_server)
    assert_pool_is_whole(faulty_server, POOL_TOKENS, expects_faults=True)
