"""Prompts longer than the KV pool, compressed chunk by chunk."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from tests.server.checks import STRICT_CHECKS, assert_pool_is_whole, metasoft

pytestmark = pytest.mark.server

POOL_TOKENS, CHUNK, RATIO = 2560, 256, 8
FLAGS = [
    "--enable-metasoft", "--metasoft-during-prefill", "--metasoft-min-tokens", "128", "--metasoft-ratio", str(RATIO),
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
