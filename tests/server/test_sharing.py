"""One document, many questions: the document becomes a compressed segment of its own that all of them reuse."""

import json

import pytest
import requests
import torch
from safetensors.torch import load_file

from sglang_metasoft.bench.document_questions import POOL_TOKENS, ask_all, make_prompts
from tests.server.checks import SALT, SOFT_TOKENS, STRICT_CHECKS, assert_pool_is_whole, metasoft, wait_until_idle

pytestmark = pytest.mark.server

FLAGS = [*SOFT_TOKENS, "--enable-metrics", "--max-total-tokens"]
DOCUMENT, WINDOW = 1500, 64
WARMED, WARMED_TOKENS, POOL_FOR_FOUR = 10, 2000, 8400


@pytest.fixture(scope="module")
def trace_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("trace")


@pytest.fixture(scope="module")
def server(start_server, trace_dir):
    config = json.dumps({"trace_dir": str(trace_dir)})
    return start_server(*FLAGS, str(POOL_FOR_FOUR), "--metasoft-config", config, env=STRICT_CHECKS)


def question(document_ids: list[int], number: int, length: int = 90) -> list[int]:
    """Tokens that no two numbers share from the first on."""
    return [7000 + number, *document_ids[3000 + 97 * number :][: length - 1]]


def test_a_document_seen_twice_becomes_a_segment_that_a_third_question_reuses(server, document_ids):
    document = document_ids[:DOCUMENT]
    first, second, third = (server.generate(document + question(document_ids, n)) for n in range(3))
    assert metasoft(first)["span_tokens"] == DOCUMENT + 90 - WINDOW
    # The second finds the raw document, and its own segment ends where it leaves the first.
    assert second["meta_info"]["cached_tokens"] == DOCUMENT
    assert metasoft(second) == {"span_tokens": DOCUMENT, "kv_tokens": DOCUMENT // 4 + 90, "reused_tokens": 0}
    assert metasoft(third) == {"span_tokens": DOCUMENT, "kv_tokens": DOCUMENT // 4 + 90, "reused_tokens": DOCUMENT}
    assert third["meta_info"]["cached_tokens"] == DOCUMENT


def test_what_follows_the_document_becomes_a_second_segment_if_it_is_long(server, document_ids):
    document, long, salt = document_ids[:DOCUMENT], question(document_ids, 5, length=800), {SALT: "second"}
    for number in range(2):
        server.generate(document + question(document_ids, number), **salt)
    response = server.generate(document + long, **salt)
    assert metasoft(response)["span_tokens"] == DOCUMENT + 800 - WINDOW
    assert metasoft(response)["kv_tokens"] == (DOCUMENT + 800) // 4
    assert metasoft(response)["reused_tokens"] == DOCUMENT
    again = server.generate(document + long, **salt)
    assert metasoft(again)["reused_tokens"] == DOCUMENT + 800 - WINDOW


def test_a_client_names_the_boundary_so_that_the_second_question_reuses_it_already(server, document_ids):
    document = document_ids[100 : 100 + DOCUMENT]
    params = {"metasoft_boundary": DOCUMENT}
    # Shorter than the window: the boundary decides, not the window.
    first = server.generate(document + question(document_ids, 1, 20), custom_params=params)
    assert metasoft(first) == {"span_tokens": DOCUMENT, "kv_tokens": DOCUMENT // 4 + 20, "reused_tokens": 0}
    second = server.generate(document + question(document_ids, 2, 20))
    assert metasoft(second)["reused_tokens"] == DOCUMENT == second["meta_info"]["cached_tokens"]


def test_both_sides_of_a_boundary_are_compressed_at_once(server, document_ids):
    prompt = document_ids[200:2600]
    response = server.generate(prompt, custom_params={"metasoft_boundary": 1200})
    assert metasoft(response) == {"span_tokens": 2400 - WINDOW, "kv_tokens": 600, "reused_tokens": 0}
    shared = server.generate(prompt[:1200] + question(document_ids, 3))
    assert metasoft(shared)["reused_tokens"] == 1200


@pytest.mark.parametrize("length", [1, 20, 50, 64, 65, 90])
def test_the_document_is_chosen_without_a_question_however_short_they_are(server, document_ids, trace_dir, length):
    """The third question reuses the document's own segment, which is the same whichever question came first."""
    document, questions = document_ids[:DOCUMENT], [question(document_ids, n, length) for n in range(3)]
    traces = {}
    for order in ((0, 1, 2), (1, 0, 2)):
        name = f"short-{length}-" + "".join(map(str, order))
        responses = [server.generate(document + questions[n], rid=f"{name}-{n}", **{SALT: name}) for n in order]
        alone = {"span_tokens": DOCUMENT, "kv_tokens": DOCUMENT // 4 + length}
        assert metasoft(responses[1]) == alone | {"reused_tokens": 0}
        assert metasoft(responses[2]) == alone | {"reused_tokens": DOCUMENT}
        # A repeat of the first question reuses its own prefix, unless the document's leaves as little to compute.
        again = server.generate(document + questions[order[0]], **{SALT: name})
        assert metasoft(again)["reused_tokens"] == (DOCUMENT + length - WINDOW if length > 1 else DOCUMENT)
        traces[order] = [load_file(next(trace_dir.glob(f"{name}-{n}-0-*"))) for n in order[:2]]
    (first, ours), (other_first, theirs) = traces.values()
    assert torch.equal(ours["kept"], theirs["kept"])
    torch.testing.assert_close(ours["key"], theirs["key"], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ours["value"], theirs["value"], rtol=1e-3, atol=1e-3)
    # With a question in view other entries are chosen.
    assert not torch.equal(first["kept"], other_first["kept"])


def warm_and_ask(server, document_ids: list[int], max_new_tokens: int, salt: str, **fields) -> list[int]:
    """Send ten documents, then a question over each, newest first; returns how much of each was there still."""
    fields[SALT] = salt
    documents = [[7200 + n, *document_ids[50 * n :][: WARMED_TOKENS - 1]] for n in range(WARMED)]
    for ids in documents:
        server.generate(ids, max_new_tokens, **fields)
    answers = [server.generate(ids + question(document_ids, 1, 20), 4, **fields) for ids in reversed(documents)]
    return [answer["meta_info"]["cached_tokens"] for answer in answers]


@pytest.mark.parametrize("max_new_tokens", [1, 0])
def test_ten_documents_are_warmed_in_a_pool_for_four(server, document_ids, max_new_tokens):
    cached = warm_and_ask(server, document_ids, max_new_tokens, f"warm {max_new_tokens}")
    assert cached == [WARMED_TOKENS] * WARMED


def test_uncompressed_the_pool_keeps_four_documents_at_most(server, document_ids):
    cached = warm_and_ask(server, document_ids, 1, "raw", custom_params={"metasoft_ratio": 1})
    assert cached[0] == WARMED_TOKENS and sum(tokens == WARMED_TOKENS for tokens in cached) <= 4, cached


def test_several_answers_to_one_prompt_share_one_prefix(server, document_ids):
    """SGLang sends the prompt once without output before it sends it n times: that one is compressed."""
    prompt, before = document_ids[900:2100], server.metrics(priority="")
    responses = server.generate(prompt, 4, sampling_params={"n": 4, "temperature": 1})
    assert [metasoft(response)["reused_tokens"] for response in responses] == [1200 - WINDOW] * 4
    spans = server.metrics(priority="")["sglang:metasoft_spans_total"] - before["sglang:metasoft_spans_total"]
    assert spans == 1


def test_what_sglang_keeps_out_of_the_tree_leaves_nothing(server, document_ids):
    prompt, fields = document_ids[950:2150], {"bootstrap_host": "2.2.2.2", SALT: "kept out"}
    for _ in range(2):
        response = server.generate(prompt, **fields)
        assert metasoft(response) == {"span_tokens": 1200 - WINDOW, "kv_tokens": 300, "reused_tokens": 0}
    assert server.generate(prompt, **fields)["meta_info"]["cached_tokens"] == 0


def test_a_session_id_alone_switches_nothing_off(server, document_ids):
    """It is the caller's name for a conversation, as gateways and agents send it with every turn."""
    response = server.generate(document_ids[1000:2200], session_id="one user's", **{SALT: "session"})
    assert metasoft(response)["span_tokens"] == 1200 - WINDOW


def test_raw_spans_are_evicted_before_any_compressed_prefix(server, document_ids):
    """More than the pool holds of both: the oldest raw twins go, each compressed prefix stays, whatever its age."""
    wait_until_idle(server)
    assert requests.post(f"{server.url}/flush_cache", timeout=60).status_code == 200
    prompts = [[8000 + number, *document_ids[60 * number :][: DOCUMENT - 1]] for number in range(8)]
    kept = [metasoft(server.generate(ids))["kv_tokens"] for ids in prompts]
    assert sum(kept) < POOL_FOR_FOUR / 2 and sum(kept) + len(prompts) * DOCUMENT > POOL_FOR_FOUR
    assert [metasoft(server.generate(ids))["reused_tokens"] for ids in prompts] == [DOCUMENT - WINDOW] * len(prompts)
    cached = [
        server.generate(prompts[number], 1, custom_params={"metasoft_ratio": 1})["meta_info"]["cached_tokens"]
        for number in (-1, 0)
    ]
    assert cached[0] >= DOCUMENT - WINDOW and cached[1] == 0


@pytest.mark.parametrize("boundary", [0, -1, 1.5, "1200", None, True, 800, 10**30])
def test_a_boundary_outside_the_prompt_is_http_400(server, document_ids, boundary):
    body = {"input_ids": document_ids[:800], "sampling_params": {"custom_params": {"metasoft_boundary": boundary}}}
    response = requests.post(f"{server.url}/generate", json=body, timeout=60)
    assert response.status_code == 400, response.text
    assert "metasoft_boundary" in response.text and "allowed" in response.text and "an integer" in response.text


@pytest.mark.parametrize("keep_raw", [True, False], ids=["keep-raw", "free-raw"])
def test_twenty_questions_compute_little_but_themselves(start_server, tokenizer, keep_raw):
    """A document of 6,000 tokens in a pool that cannot hold it twice; freed raw, only the second computes it again."""
    server = start_server(
        *FLAGS, str(POOL_TOKENS), *([] if keep_raw else ["--no-metasoft-keep-raw"]), env=STRICT_CHECKS
    )
    prompts, answers, shared = make_prompts(tokenizer)
    if not keep_raw:
        prompts, answers = prompts[:6], answers[:6]
    assert shared >= 6000 and POOL_TOKENS < 2 * shared
    result = ask_all(server, prompts, answers, shared, salted=False)
    own = result["own_tokens_after_first"]
    # The second computes the first one's raw window again, as far as it is the document's.
    allowed = 1.1 * own + WINDOW if keep_raw else 1.1 * own + shared
    assert result["computed_after_first"] <= allowed, json.dumps(result)
    assert not result["bypassed"] and max(result["kv_tokens"]) < shared / 4 + 150
    assert_pool_is_whole(server, POOL_TOKENS)
