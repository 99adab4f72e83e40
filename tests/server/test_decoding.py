"""Decode steps after a compression: positions against the reference, beams beside, log-probabilities of the prompt."""

import dataclasses
import json

import pytest
import requests

from tests.reference.meta_soft_reference import Cache, Reference
from tests.server.checks import SALT, STRICT_CHECKS, assert_pool_is_whole, metasoft, wait_until

pytestmark = pytest.mark.server

POOL_TOKENS, WINDOW, SINK, TARGETS, MIN_TOKENS = 6000, 64, 4, 4, 512
STEPS, TOP = 16, 20
LOGPROB_TOLERANCE = 2e-3  # float32 on both sides; with an offset left out some step is wrong by more than 0.1
FEW_NEW_TOKENS = 16  # of a request's output that SGLang sets room aside for


@pytest.fixture(scope="module")
def server(start_server, compressor_dir):
    return start_server(
        "--dtype", "float32", "--enable-metasoft", "--metasoft-path", str(compressor_dir),
        "--metasoft-config", json.dumps({"consolidation": "attention_flow"}), "--enable-metrics",
        "--max-total-tokens", str(POOL_TOKENS), "--enable-return-hidden-states", "--metasoft-fidelity-sample", "1",
        env=STRICT_CHECKS | {"SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": str(FEW_NEW_TOKENS)},
    )  # fmt: skip


@pytest.fixture(scope="module")
def reference(model_dir, compressor_dir):
    return Reference(model_dir, compressor_dir)


def decode(server, ids: list[int], **fields) -> dict:
    """STEPS tokens, with the most likely ones of each step."""
    sampling = {"sampling_params": {"ignore_eos": True}}
    return server.generate(ids, STEPS, return_logprob=True, top_logprobs_num=TOP, **sampling, **fields)


def largest_error(reference: Reference, cache: Cache, ids: list[int], response: dict) -> tuple[float, Cache]:
    """Step through the server's own output, so that near ties do not matter.

    Args:
        cache: of the reference, before ``ids``.
        ids: what the first step computes.

    Returns:
        The largest difference of a log-probability at any step, and the cache without the last output.
    """
    error = 0.0
    for token, top in zip(response["output_ids"], response["meta_info"]["output_top_logprobs"], strict=True):
        cache, logprobs = reference.extend(cache, ids)
        error = max(error, *(abs(logprobs[id_].item() - logprob) for logprob, id_, _ in top))
        ids = [token]
    return error, cache


def first_step(reference: Reference, prompt: list[int], compressed: Cache, response: dict) -> tuple[float, Cache]:
    """The first token comes from the raw prompt, the others from the compressed one."""
    (top, *later), meta = response["meta_info"]["output_top_logprobs"], response["meta_info"]
    _, logprobs = reference.prefilled[tuple(prompt)]
    first = max(abs(logprobs[id_].item() - logprob) for logprob, id_, _ in top)
    rest = {"output_ids": response["output_ids"][1:], "meta_info": meta | {"output_top_logprobs": later}}
    error, cache = largest_error(reference, compressed, response["output_ids"][:1], rest)
    return max(first, error), cache


@pytest.mark.parametrize("ratio", [4, 8])
def test_two_turns_decode_at_their_logical_positions(server, reference, document_ids, ratio):
    prompt, question = document_ids[:1100], document_ids[3000:3040]
    options = {"custom_params": {"metasoft_ratio": ratio}}
    first = decode(server, prompt, **options)
    entries = metasoft(first)["kv_tokens"] - WINDOW
    assert metasoft(first)["span_tokens"] == len(prompt) - WINDOW and entries == -(-len(prompt) // ratio) - WINDOW
    second = decode(server, prompt + first["output_ids"] + question, **options)
    assert metasoft(second)["reused_tokens"] == len(prompt) - WINDOW

    compressed = reference.compress(prompt, WINDOW, entries, SINK, TARGETS).cache
    error, cache = first_step(reference, prompt, compressed, first)
    assert error < LOGPROB_TOLERANCE
    error, _ = largest_error(reference, cache, first["output_ids"][-1:] + question, second)
    assert error < LOGPROB_TOLERANCE


@pytest.mark.parametrize("ratio", [4, 8])
def test_two_segments_with_a_boundary_decode_at_their_logical_positions(server, reference, document_ids, ratio):
    prompt, boundary = document_ids[1000:2500], 700
    response = decode(server, prompt, custom_params={"metasoft_ratio": ratio, "metasoft_boundary": boundary})
    head = -(-boundary // ratio)
    rest = metasoft(response)["kv_tokens"] - head - WINDOW
    assert metasoft(response)["span_tokens"] == len(prompt) - WINDOW and rest > 0

    cache = reference.prefill(prompt)
    cache = reference.compress_span(cache, boundary, head, SINK, TARGETS, at_boundary=True).cache
    cache = reference.compress_span(cache, len(prompt) - WINDOW - boundary, rest, 0, TARGETS).cache
    error, _ = first_step(reference, prompt, cache, response)
    assert error < LOGPROB_TOLERANCE


@pytest.mark.skipif(SALT == "extra_key", reason="SGLang 0.5.17 has no beam search")
def test_beams_decode_beside_a_compressed_request(server, document_ids):
    """In one batch, whose rows are then not its requests; both answer as they do alone."""
    ids, beam_ids = document_ids[200:1300], document_ids[2000:2060]
    long = {"ignore_eos": True}
    beams = {"input_ids": beam_ids, "sampling_params": {"beam_width": 3, "n": 2, "max_new_tokens": 12}}

    def search() -> list[list[int]]:
        response = requests.post(f"{server.url}/generate", json=beams, timeout=120)
        assert response.status_code == 200, response.text
        answer = response.json()
        assert answer["meta_info"]["metasoft_bypass"] == "beam_search"
        return [beam["output_ids"] for beam in answer["meta_info"]["beam_results"]]

    server.generate(ids, 2)  # so that both runs below start from the prefix
    alone, beams_alone = server.generate(ids, 200, sampling_params=long), search()
    body = {"input_ids": ids, "stream": True, "sampling_params": long | {"max_new_tokens": 200, "temperature": 0}}
    with requests.post(f"{server.url}/generate", json=body, stream=True, timeout=300) as stream:
        lines = (json.loads(line[6:]) for line in stream.iter_lines() if line.startswith(b"data: {"))
        next(lines)
        assert search() == beams_alone
        rest = list(lines)
    assert len(rest) > 20, "the compressed request had ended before the beams"
    assert rest[-1]["output_ids"] == alone["output_ids"] and metasoft(rest[-1])["kv_tokens"] == 275
    assert_pool_is_whole(server, POOL_TOKENS)


def sampled(server) -> tuple[float, float]:
    """Of the histogram of divergences: how many, and their sum in nats."""
    metrics = server.metrics()
    return tuple(metrics.get(f"sglang:metasoft_fidelity_kl_{name}", 0.0) for name in ("count", "sum"))


@pytest.mark.parametrize("boundary", [None, 700])
def test_live_fidelity_is_the_references_divergence_of_the_next_token(server, reference, document_ids, boundary):
    """One observation for each segment, of both forms of the cache with the prompt's last token run over them."""
    prompt, ratio = document_ids[500:1900], 8
    options = {"metasoft_ratio": ratio} | ({"metasoft_boundary": boundary} if boundary else {})
    count, total = sampled(server)
    response = server.generate(prompt, 4, custom_params=options, **{SALT: f"fidelity {boundary}"})

    caches = [reference.prefill(prompt)]
    first = -(-boundary // ratio) if boundary else metasoft(response)["kv_tokens"] - WINDOW
    span = boundary or len(prompt) - WINDOW
    caches.append(reference.compress_span(caches[0], span, first, SINK, TARGETS, at_boundary=bool(boundary)).cache)
    if boundary:
        rest = metasoft(response)["kv_tokens"] - first - WINDOW
        caches.append(reference.compress_span(caches[1], len(prompt) - WINDOW - span, rest, 0, TARGETS).cache)
    logprobs = [reference.extend(without_the_last(cache), prompt[-1:])[1] for cache in caches]
    expected = sum(
        (before.exp() * (before - after)).sum().item() for before, after in zip(logprobs, logprobs[1:], strict=False)
    )
    name = "sglang:metasoft_fidelity_kl_count"
    wait_until(server, lambda metrics: metrics.get(name, 0) >= count + len(caches) - 1, "every observation")
    new_count, new_total = sampled(server)
    assert new_count == count + len(caches) - 1
    assert expected > 0.001, "both forms say the same: this shows nothing"
    assert abs(new_total - total - expected) < 0.02 * expected + 1e-4


def without_the_last(cache: Cache) -> Cache:
    layers = [(keys[:, :-1], values[:, :-1]) for keys, values in cache.layers]
    return dataclasses.replace(cache, ids=cache.ids[:-1], layers=layers)


LOGPROB_CASES = {  # prompt tokens, start, boundary seen in the tree, options
    "seen": (600, 540, 570, {}),
    "named": (600, 540, None, {"metasoft_boundary": 599}),
    "budget": (600, 540, 570, {"metasoft_budget": 80}),
    "high ratio": (1000, 936, None, {"metasoft_ratio": 40, "metasoft_boundary": 999}),
    "high ratio, seen": (700, 636, 660, {"metasoft_ratio": 32}),
    "boundary before the start": (700, 680, None, {"metasoft_boundary": 600}),
    "last token": (700, 699, None, {}),
}


@pytest.mark.parametrize("case", LOGPROB_CASES)
def test_prompt_logprobs_in_the_window_are_those_of_the_raw_prompt(server, document_ids, case):
    """On the first run they come from the prefill itself; on a repeat the ids are right, the values compressed ones."""
    length, start, seen, options = LOGPROB_CASES[case]
    at = 400 * list(LOGPROB_CASES).index(case)
    ids = document_ids[at : at + length]
    fields = {
        "return_logprob": True, "logprob_start_len": start, "top_logprobs_num": 3, "token_ids_logprob": [11, 222],
        "return_hidden_states": True,
    }  # fmt: skip
    plain = server.generate(ids, 4, custom_params={"metasoft_ratio": 1}, **{SALT: "plain"}, **fields)["meta_info"]
    if seen is not None:
        other = ids[:seen] + document_ids[4000:4100]
        assert metasoft(server.generate(other, 2, custom_params=options))["span_tokens"] > 0
    response = server.generate(ids, 4, custom_params=options, **fields)
    ours = response["meta_info"]
    assert [token for _, token, _ in ours["input_token_logprobs"]] == ids[start:]
    assert MIN_TOKENS <= metasoft(response)["span_tokens"] <= start
    if metasoft(response)["reused_tokens"] == 0:
        for name in ("input_token_logprobs", "input_top_logprobs", "input_token_ids_logprobs"):
            assert_logprobs_equal(ours[name], plain[name])
    again = server.generate(ids, 4, custom_params=options, **fields)["meta_info"]
    assert [token for _, token, _ in again["input_token_logprobs"]] == ids[start:]
    assert again["metasoft_reused_tokens"] == ours["metasoft_span_tokens"]
    assert len(again["hidden_states"]) == len(ours["hidden_states"]) == len(plain["hidden_states"])


def assert_logprobs_equal(ours: list, plain: list) -> None:
    """Triples of log-probability, id and text, or lists of them for each token."""
    assert len(ours) == len(plain)
    for one, other in zip(ours, plain, strict=True):
        if one is None or isinstance(one[0], list):
            assert (one is None) == (other is None)
            assert_logprobs_equal(one or [], other or [])
        else:
            assert one[1] == other[1] and (one[0] is None) == (other[0] is None)
            assert one[0] is None or abs(one[0] - other[0]) < 1e-4


def test_room_is_set_aside_for_clients_without_max_tokens(server, document_ids):
    """Two prompts that fit raw side by side, not with their consolidated entries: the second one waits for them."""
    prompts = [document_ids[n * 100 :][:2700] for n in (1, 2)]
    # The first token that has any character ends each.
    sampling = {"temperature": 0, "max_new_tokens": None, "stop_regex": "."}
    body = {"input_ids": prompts, "sampling_params": sampling, SALT: "room"}
    responses = requests.post(f"{server.url}/generate", json=body, timeout=300).json()
    for response in responses:
        assert metasoft(response) == {"span_tokens": 2700 - WINDOW, "kv_tokens": 675, "reused_tokens": 0}
    assert_pool_is_whole(server, POOL_TOKENS)
