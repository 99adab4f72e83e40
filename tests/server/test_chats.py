"""A chat that grows over twelve turns: each grown tail becomes a segment, earlier segments stay what they are."""

import pytest
import requests

from sglang_metasoft.methods.auto import WITHOUT_COMPRESSOR
from tests.server.checks import STRICT_CHECKS, assert_pool_is_whole, metasoft

pytestmark = pytest.mark.server

POOL_TOKENS, CONTEXT = 12288, 8192
RATIO, WINDOW, THRESHOLD = 4, 64, 256
TURNS, TURN_TOKENS = 12, 180


@pytest.fixture(scope="module")
def server(start_server):
    flags = ["--metasoft-min-tokens", str(THRESHOLD), "--max-total-tokens", str(POOL_TOKENS)]
    return start_server("--enable-metasoft", "--enable-metrics", *flags, env=STRICT_CHECKS)


def test_without_a_compressor_the_server_says_what_it_serves_instead(server):
    """This model has too few layers for the one that ships."""
    state = server.info()["internal_states"][0]["metasoft"]
    assert state["compressor"]["kind"] == "training_free" and state["method"] == WITHOUT_COMPRESSOR["method"]
    log = server.log.read_text()
    assert log.count("NO COMPRESSOR was found") == 1 and "sglang-metasoft fit" in log
    assert 'kind="training_free"' in requests.get(f"{server.url}/metrics", timeout=60).text


def test_twelve_turns_hold_a_quarter_and_compute_only_what_is_new(server, document_ids):
    chat, spans, new_tokens = document_ids[:900], [0], 900
    for turn in range(TURNS):
        response = server.generate(chat, 24, sampling_params={"ignore_eos": True})
        meta, report = response["meta_info"], metasoft(response)
        assert meta["prompt_tokens"] == len(chat)
        assert report["kv_tokens"] <= len(chat) / RATIO + WINDOW + THRESHOLD
        assert report["reused_tokens"] == spans[-1]  # the last turn's prefix, as it was, whole
        # SGLang never caches the last output token; a tail that is compressed now may have been its raw window.
        assert meta["prompt_tokens"] - meta["cached_tokens"] <= new_tokens + 1 + (WINDOW if turn else 0)
        spans.append(report["span_tokens"])
        chat = chat + response["output_ids"] + document_ids[1000 + TURN_TOKENS * turn :][:TURN_TOKENS]
        new_tokens = TURN_TOKENS
    assert sorted(spans) == spans and len(set(spans)) >= 8, spans
    assert_pool_is_whole(server, POOL_TOKENS)


def test_length_limits_count_logical_tokens(server, document_ids):
    """Compressed, the prompt would fit the context four times over; its positions would not."""
    prompt, room = (document_ids[7:] + document_ids)[: CONTEXT - 60], 60
    for reused in (0, len(prompt) - WINDOW):
        response = server.generate(prompt, room, sampling_params={"ignore_eos": True})
        assert metasoft(response)["kv_tokens"] <= -(-len(prompt) // RATIO)
        assert metasoft(response)["reused_tokens"] == reused
        meta = response["meta_info"]
        assert meta["finish_reason"]["type"] == "length" and room - 2 <= meta["completion_tokens"] <= room
    for ids, new_tokens in ((prompt, room + 1), (prompt + prompt[:200], 4)):
        body = {"input_ids": ids, "sampling_params": {"max_new_tokens": new_tokens}}
        refused = requests.post(f"{server.url}/generate", json=body, timeout=60)
        assert refused.status_code == 400 and str(CONTEXT) in refused.text, refused.text
