"""Tiny random models of each family on real servers: at ratio 1 what plain SGLang and transformers say, at ratio 4 the
reference's entries and what a model says over them, and a chat and a shared document that find them again.

Those whose first forward compiles for a minute, or that few deploy, run in ``make test-all`` alone.
"""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from tests.reference.meta_soft_reference import Cache, Reference
from tests.server.checks import SALT, metasoft
from tests.server.forked import start
from tests.server.test_reference import LOGPROB_TOLERANCE, TARGETS, TOP, assert_entries_equal
from tests.tiny_models import MODELS, VOCABULARY, make_model, make_twin

pytestmark = pytest.mark.server

SLOW = {"glm4_moe", "hunyuan_v3", "starcoder2", "gpt2", "llama", "gemma3", "olmo3", "exaone4", "windows_alone"}
NAMES = [
    pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW))
    for name, tiny in MODELS.items()
    if tiny.is_run and not tiny.processor  # those are in test_vision.py
]
ROOT = Path(__file__).parents[2]
PROMPT_TOKENS, WINDOW, SINK, RATIO = 600, 64, 4, 4
PLAIN_FLAGS = ("--dtype", "float32", "--skip-server-warmup", "--max-total-tokens", "16384", "--sleep-on-idle")
FLAGS = ("--enable-metasoft", "--metasoft-ratio", "1", "--metasoft-min-tokens", "128", *PLAIN_FLAGS)


def external_models() -> dict[str, str]:
    """Environment in which SGLang finds the classes of ``tests/external_models``."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": path, "SGLANG_EXTERNAL_MODEL_PACKAGE": "tests.external_models"}


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def model_dir(name, tmp_path_factory):
    """For the compressor and the reference: the twin."""
    return make_twin(tmp_path_factory.mktemp(name) / "twin", name)


@pytest.fixture(scope="module")
def reference(model_dir, compressor_dir):
    return Reference(model_dir, compressor_dir)


@pytest.fixture(scope="module")
def served(name, compressor_dir, tmp_path_factory):
    folder, trace_dir = tmp_path_factory.mktemp(name), tmp_path_factory.mktemp("trace")
    config = {"trace_dir": str(trace_dir), "consolidation": "attention_flow"}
    flags = (*FLAGS, "--metasoft-path", str(compressor_dir), "--metasoft-config", json.dumps(config))
    if not MODELS[name].processor:
        flags += ("--skip-tokenizer-init",)
    env = external_models() if name == "exaone4" else {}
    with start(make_model(folder / "model", name), flags, log=folder / "server.log", env=env) as server:
        yield SimpleNamespace(server=server, trace_dir=trace_dir)


@pytest.fixture(scope="module")
def ids():
    generator = torch.Generator().manual_seed(3)
    return torch.randint(3, VOCABULARY, (PROMPT_TOKENS + 400,), generator=generator).tolist()


def test_the_start_tests_the_model(served, name):
    text = served.server.log.read_text()
    assert f"self-test of {MODELS[name].served_by or MODELS[name].class_name} passed" in text
    is_followed = name not in ("ministral3", "gpt2")
    assert ("in a way that no key_bias can follow" not in text) is is_followed
    assert ("layers [2] not turned" in text) is (name in ("exaone4", "cohere2"))


def test_at_ratio_one_it_says_what_the_plain_model_says(served, name, reference, ids):
    """Two turns, compressed and not; and transformers' own greedy choice."""
    said: dict[str, list] = {}
    for tenant, params in (("plain", {"metasoft_ratio": 1}), ("whole", {})):
        first = served.server.generate(ids[:PROMPT_TOKENS], 6, custom_params=params, **{SALT: tenant})
        more = ids[:PROMPT_TOKENS] + first["output_ids"] + ids[PROMPT_TOKENS : PROMPT_TOKENS + 40]
        second = served.server.generate(more, 6, custom_params=params, **{SALT: tenant})
        said[tenant] = [first["output_ids"], second["output_ids"]]
        reused = 0 if tenant == "plain" else PROMPT_TOKENS - WINDOW
        assert metasoft(second)["reused_tokens"] == reused
    assert said["whole"] == said["plain"]
    if not MODELS[name].has_twin:
        return
    cache, logprobs = reference.extend(Cache([], []), ids[:PROMPT_TOKENS])
    for token in said["plain"][0]:
        assert token == logprobs.argmax().item()
        cache, logprobs = reference.extend(cache, [token])


def assert_logprobs_equal(response: dict, step: int, logprobs: torch.Tensor) -> None:
    for logprob, token, _ in response["meta_info"]["output_top_logprobs"][step]:
        assert abs(logprobs[token].item() - logprob) < LOGPROB_TOLERANCE, (step, token)


def test_at_ratio_four_entries_and_decoding_are_the_references(served, name, reference, ids):
    if not MODELS[name].has_twin:
        pytest.skip("transformers computes something else")
    prompt, span, entries = ids[:PROMPT_TOKENS], PROMPT_TOKENS - WINDOW, PROMPT_TOKENS // RATIO - WINDOW
    options = dict(custom_params={"metasoft_ratio": RATIO}, return_logprob=True, top_logprobs_num=TOP)
    options["sampling_params"] = {"ignore_eos": True}
    first = served.server.generate(prompt, 4, rid="family_1", **{SALT: "four"}, **options)
    assert metasoft(first)["kv_tokens"] == PROMPT_TOKENS // RATIO
    (trace,) = [load_file(path) for path in served.trace_dir.glob("family_1-*.safetensors")]
    expected = reference.compress(prompt, WINDOW, entries, SINK, TARGETS)
    tiny = MODELS[name]
    plan = (0, span, entries, SINK, False)
    assert_entries_equal(trace, expected, plan, tiny.entry_tolerance, tiny.most_contested)
    # Over the server's own entries: where two are nearly worth the same, the reference may have kept the other one.
    cache = Cache(prompt, [], span, entries)
    for own, whole in zip(zip(trace["key"], trace["value"], strict=True), expected.cache.layers, strict=True):
        both = zip(own, whole, strict=True)
        cache.layers.append(tuple(torch.cat([mine.transpose(0, 1), raw[:, entries:]], 1) for mine, raw in both))
    for step, token in enumerate(first["output_ids"][:-1], 1):
        cache, logprobs = reference.extend(cache, [token])
        assert_logprobs_equal(first, step, logprobs)


def test_a_document_is_shared_by_two_questions(served, ids):
    document, options = ids[100:600], {"metasoft_ratio": RATIO, "metasoft_boundary": 500}
    for number, question in enumerate((ids[600:680], ids[700:780])):
        response = served.server.generate(document + question, 2, custom_params=options, **{SALT: "shared"})
        assert metasoft(response)["reused_tokens"] == (500 if number else 0)
