"""Models with sliding windows on real servers.

A model of window layers alone says what plain SGLang says at every ratio, since nothing that a later token sees is ever
dropped: in chats, after shared documents, with prompts compressed chunk by chunk, on pages. In a mixed model several
segments are the reference's.
"""

import json
from types import SimpleNamespace

import pytest
import requests
import torch
from safetensors.torch import load_file

from tests.reference.meta_soft_reference import Reference
from tests.server.checks import SALT, STRICT_CHECKS, metasoft
from tests.server.forked import start
from tests.server.test_model_families import FLAGS, SINK, assert_logprobs_equal, external_models
from tests.server.test_reference import TARGETS, TOP, assert_entries_equal
from tests.tiny_models import MODELS, VOCABULARY, WINDOW_TOKENS, make_model, make_twin

pytestmark = pytest.mark.server

RAW_TOKENS = 64  # that stay raw at a prompt's end
KEPT = WINDOW_TOKENS - 1  # of a span, at the least
CHUNK_TOKENS, POOL_TOKENS = 256, 1280
RATIOS = (1.2, 2, 4, 100)


@pytest.fixture(scope="module")
def ids():
    generator = torch.Generator().manual_seed(5)
    return torch.randint(3, VOCABULARY, (4000,), generator=generator).tolist()


@pytest.fixture(scope="module")
def windows_alone(tmp_path_factory):
    """Served as a model without a compressor is: biased keys included."""
    folder = tmp_path_factory.mktemp("windows_alone")
    flags = (*FLAGS, "--enable-metrics", "--metasoft-fidelity-sample", "1")
    with start(
        make_model(folder / "model", "windows_alone"), flags, log=folder / "server.log", env=STRICT_CHECKS
    ) as server:
        yield server


@pytest.fixture(scope="module")
def chunked(windows_alone, tmp_path_factory):
    """The same model on pages, with prompts compressed chunk by chunk, in a pool smaller than some."""
    folder = tmp_path_factory.mktemp("chunked")
    flags = (
        *FLAGS, "--page-size", "16", "--metasoft-during-prefill", "--chunked-prefill-size", str(CHUNK_TOKENS),
        "--max-total-tokens", str(POOL_TOKENS),
    )  # fmt: skip
    with start(
        make_model(folder / "model", "windows_alone"), flags, log=folder / "server.log", env=STRICT_CHECKS
    ) as server:
        yield server


def chat(server, ids: list[int], tenant: str, params: dict) -> list[dict]:
    """Three turns: with a span of its own each, but for the last, which is too short for one."""
    turns, prompt = [], ids[:600]
    for more in (300, 60, 0):
        options = dict(return_logprob=True, sampling_params={"ignore_eos": True}, custom_params=params)
        turns.append(server.generate(prompt, 8, **{SALT: tenant}, **options))
        prompt = prompt + turns[-1]["output_ids"] + ids[len(prompt) : len(prompt) + more]
    return turns


def said(responses: list[dict]) -> list[list[int]]:
    return [response["output_ids"] for response in responses]


def assert_says_the_same(responses: list[dict], plain: list[dict]) -> None:
    assert said(responses) == said(plain)
    for one, other in zip(responses, plain, strict=True):
        for ours, theirs in zip(
            *(answer["meta_info"]["output_token_logprobs"] for answer in (one, other)), strict=True
        ):
            assert abs(ours[0] - theirs[0]) < 1e-3


@pytest.mark.parametrize("params", [{"metasoft_ratio": ratio} for ratio in RATIOS] + [{"metasoft_budget": 20}], ids=str)
def test_windows_alone_say_at_every_ratio_what_plain_sglang_says(windows_alone, ids, params):
    plain = chat(windows_alone, ids, "plain", {"metasoft_ratio": 1})
    turns = chat(windows_alone, ids, f"chat {params}", params)
    assert_says_the_same(turns, plain)
    reports = [metasoft(turn) for turn in turns]
    spans = [600 - RAW_TOKENS, 600 + 8 + 300 - RAW_TOKENS]
    assert [report["span_tokens"] for report in reports] == [spans[0], spans[1], spans[1]]
    assert [report["reused_tokens"] for report in reports] == [0, spans[0], spans[1]]
    if params.get("metasoft_ratio", 100) == 100:
        assert [report["kv_tokens"] for report in reports[:2]] == [KEPT + RAW_TOKENS, 2 * KEPT + RAW_TOKENS]
    assert reports[0]["kv_tokens"] < 600 * 0.9


def test_a_shared_document_keeps_a_window_for_what_follows_it(windows_alone, ids):
    document, options = ids[1000:1500], dict(return_logprob=True, sampling_params={"ignore_eos": True})
    for number, question in enumerate((ids[1500:1540], ids[1600:1640])):
        plain = windows_alone.generate(
            document + question, 8, custom_params={"metasoft_ratio": 1}, **{SALT: "plain"}, **options
        )
        params = {"metasoft_ratio": 50, "metasoft_boundary": 500}
        response = windows_alone.generate(document + question, 8, custom_params=params, **{SALT: "shared"}, **options)
        assert_says_the_same([response], [plain])
        report = metasoft(response)
        assert report["kv_tokens"] == KEPT + len(question)
        assert report["reused_tokens"] == (500 if number else 0)


def test_what_windows_alone_say_next_is_measured_to_be_the_same(windows_alone, ids):
    """By the server itself, over both forms of a prompt."""
    params = {"metasoft_ratio": 100}
    windows_alone.generate(ids[1700:2400], 2, custom_params=params, **{SALT: "measured"})
    windows_alone.generate(ids[1700:1710], 1, **{SALT: "measured"})  # by whose step the first is read
    text = requests.get(f"{windows_alone.url}/metrics", timeout=10).text
    found = {line.split("{")[0]: float(line.split()[-1]) for line in text.splitlines() if "fidelity_kl_" in line}
    name = "sglang:metasoft_fidelity_kl"
    assert found[f"{name}_count"] > 0 and found[f"{name}_sum"] < 1e-4 * found[f"{name}_count"]


@pytest.mark.parametrize(("tokens", "reason"), [(RAW_TOKENS + 2 * KEPT - 1, "sliding_window"), (150, "too_short")])
def test_a_prompt_of_less_than_two_windows_stays_raw_and_says_so(windows_alone, ids, tokens, reason):
    response = windows_alone.generate(ids[:tokens], 2, custom_params={"metasoft_ratio": 4}, **{SALT: "short"})
    assert response["meta_info"]["metasoft_bypass"] == reason
    longer = windows_alone.generate(ids[: tokens + 100], 2, custom_params={"metasoft_ratio": 4}, **{SALT: "short"})
    assert metasoft(longer)["kv_tokens"] < tokens + 100


def test_chunks_wait_until_the_ratio_leaves_a_window(windows_alone, chunked, ids):
    """A prompt longer than the pool; and the entries of its spans are as many as the ratio says."""
    prompt, options = ids[2000 : 2000 + POOL_TOKENS + 400], dict(return_logprob=True)
    options["sampling_params"] = {"ignore_eos": True}
    plain = windows_alone.generate(prompt, 8, custom_params={"metasoft_ratio": 1}, **{SALT: "plain"}, **options)
    response = chunked.generate(prompt, 8, custom_params={"metasoft_ratio": 4}, **{SALT: "long"}, **options)
    assert_says_the_same([response], [plain])
    report = metasoft(response)
    assert report["span_tokens"] > 3 * CHUNK_TOKENS
    assert report["kv_tokens"] < len(prompt) / 4 + 3 * 16


@pytest.mark.parametrize("params", [{"metasoft_ratio": 4}, {"metasoft_budget": 20}], ids=str)
def test_windows_alone_on_pages_and_in_chunks(windows_alone, chunked, ids, params):
    plain = chat(windows_alone, ids, "plain", {"metasoft_ratio": 1})
    turns = chat(chunked, ids, f"chat {params}", params)
    assert_says_the_same(turns, plain)
    assert metasoft(turns[1])["kv_tokens"] < 908 * 0.6


@pytest.fixture(
    scope="module",
    params=["gemma3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("cohere2", "olmo3", "exaone4"))],
)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def model_dir(name, tmp_path_factory):
    """For the compressor and the reference: the twin."""
    return make_twin(tmp_path_factory.mktemp(name) / "twin", name)


@pytest.fixture(scope="module")
def mixed(name, model_dir, compressor_dir, tmp_path_factory):
    """A model of both kinds of layers, on pages."""
    folder, trace_dir = tmp_path_factory.mktemp(name), tmp_path_factory.mktemp("trace")
    config = {"trace_dir": str(trace_dir), "consolidation": "attention_flow"}
    flags = (
        *FLAGS, "--page-size", "16", "--metasoft-path", str(compressor_dir), "--metasoft-config", json.dumps(config),
        "--metasoft-during-prefill", "--chunked-prefill-size", "512",
    )  # fmt: skip
    env = external_models() if name == "exaone4" else {}
    with start(make_model(folder / "model", name), flags, log=folder / "server.log", env=env) as server:
        yield SimpleNamespace(server=server, trace_dir=trace_dir)


def test_mixed_layers_on_pages_and_in_chunks_at_ratio_one(mixed, ids):
    plain = chat(mixed.server, ids, "plain", {"metasoft_ratio": 1})
    assert_says_the_same(chat(mixed.server, ids, "whole", {}), plain)


def test_segments_of_mixed_layers_are_the_references(mixed, name, model_dir, compressor_dir, ids):
    """A document with its boundary, the question after it, and another turn: each segment over those before it."""
    reference, prompt, boundary, ratio = Reference(model_dir, compressor_dir), ids[:992], 480, 4
    tolerance = MODELS[name].entry_tolerance
    options = dict(return_logprob=True, top_logprobs_num=TOP, sampling_params={"ignore_eos": True})
    options["custom_params"] = {"metasoft_ratio": ratio, "metasoft_boundary": boundary}

    def ask(prompt: list[int], number: int):
        response = mixed.server.generate(prompt, 3, rid=f"mixed_{number}", **{SALT: "mixed"}, **options)
        traces = [load_file(path) for path in mixed.trace_dir.glob(f"mixed_{number}-*.safetensors")]
        return response, sorted(traces, key=lambda trace: trace["plan"][0].item())

    first, traces = ask(prompt, 1)
    kept = boundary // ratio + 8  # whole pages
    head = reference.compress_span(reference.prefill(prompt[:512]), boundary, kept, SINK, TARGETS, at_boundary=True)
    assert_entries_equal(traces[0], head, (0, boundary, kept, SINK, True), tolerance)
    cache, logprobs = reference.extend(head.cache, prompt[512:])
    assert_logprobs_equal(first, 0, logprobs)
    span, least = len(prompt) - RAW_TOKENS - boundary, KEPT + 1  # the ratio leaves fewer
    tail = reference.compress_span(cache, span, least, 0, TARGETS)
    assert_entries_equal(traces[1], tail, (kept, span, least, 0, False), tolerance)
    cache = tail.cache
    for step, token in enumerate(first["output_ids"][:-1], 1):
        cache, logprobs = reference.extend(cache, [token])
        assert_logprobs_equal(first, step, logprobs)
    cache, logprobs = reference.extend(cache, first["output_ids"][-1:] + ids[1000:1297])
    second, (trace,) = ask(cache.ids, 2)
    assert metasoft(second)["reused_tokens"] == boundary + span
    assert_logprobs_equal(second, 0, logprobs)
    span = len(cache.ids) // 16 * 16 - RAW_TOKENS - boundary - span
    expected = reference.compress_span(cache, span, least, 0, TARGETS)
    assert_entries_equal(trace, expected, (kept + least, span, least, 0, False), tolerance)
    cache, logprobs = reference.extend(expected.cache, second["output_ids"][:1])
    assert_logprobs_equal(second, 1, logprobs)
