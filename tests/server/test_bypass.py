"""Every reason that a request is served uncompressed for: a request that meets it, says so, and is counted under it."""

from array import array
from importlib.metadata import version
from pathlib import Path

import pytest
import requests
from metasoft_patches.adapter import load_adapter
from metasoft_patches.scheduler.admission import bypass_reason
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.sampling.custom_logit_processor import DisallowedTokensLogitsProcessor
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_metasoft.types import Bypass
from tests.server.checks import inside_env, metasoft

pytestmark = pytest.mark.server

POOL_TOKENS = 4096


def of_session(server, ids):
    session = requests.post(f"{server.url}/open_session", json={"capacity_of_str_len": 4096}, timeout=60).json()
    return server.generate(ids, session_params={"id": session})


def sending(**fields):
    """A request of the prompt with these fields."""
    return lambda server, ids: server.generate(ids, 4, **fields)


# What a client sends, or what then goes wrong. The plugin inside says to one that the tree owns its window.
REQUESTS = {
    Bypass.TOO_SHORT: lambda server, ids: server.generate(ids[:575]),
    Bypass.NOTHING_TO_DROP: sending(custom_params={"metasoft_budget": 4000}),
    Bypass.OPTED_OUT: sending(custom_params={"metasoft_ratio": 1}),
    Bypass.PROMPT_LOGPROBS: sending(return_logprob=True, logprob_start_len=0),
    Bypass.SESSION: of_session,
    Bypass.BEAM_SEARCH: sending(sampling_params={"beam_width": 2}),
    Bypass.CUSTOM_LOGIT_PROCESSOR: sending(
        custom_logit_processor=DisallowedTokensLogitsProcessor.to_str(), custom_params={"token_ids": [5]}
    ),
    Bypass.WATERMARK: sending(watermark={"enabled": False}),
    Bypass.ROUTED_EXPERTS: sending(return_routed_experts=True),
    Bypass.SHARED_WINDOW: sending(rid="inside-window"),
    Bypass.NO_FREE_SLOTS: lambda server, ids: server.generate(ids[:3000], custom_params={"metasoft_ratio": 2}),
    Bypass.FAULT: sending(rid="inside-probe"),
}
# What such a request's record is: no request brings it about on a server that runs the tests' model.
RECORDS = {
    Bypass.MULTIMODAL: {"multimodal_inputs": object()},  # of a model that sees
    Bypass.INPUT_EMBEDS: {"input_embeds": [[0.0]]},  # SGLang takes them without a radix cache alone
    Bypass.EMBED_OVERRIDES: {"positional_embed_overrides": object()},  # of Engine.score, which shows no report
}
# What needs a server of another kind.
ELSEWHERE = {
    Bypass.LORA: "test_lora.py",
    Bypass.WEIGHTS: "test_interruptions.py",
    Bypass.SLIDING_WINDOW: "test_sliding_windows.py",
}


@pytest.fixture(scope="module")
def server(start_server):
    flags = ["--enable-metrics", "--enable-custom-logit-processor", "--max-total-tokens", str(POOL_TOKENS)]
    return start_server("--enable-metasoft", *flags, env=inside_env())


def test_no_reason_lacks_a_row():
    assert sorted([*REQUESTS, *RECORDS, *ELSEWHERE]) == sorted(Bypass)
    assert all(f'"{reason.value}"' in Path(__file__).with_name(name).read_text() for reason, name in ELSEWHERE.items())


@pytest.mark.parametrize("reason", REQUESTS, ids=lambda reason: reason.value)
def test_a_request_says_why_it_is_not_compressed(server, document_ids, reason):
    if version("sglang") == "0.5.17" and reason in (Bypass.BEAM_SEARCH, Bypass.WATERMARK):
        pytest.skip("this version has none")
    prompt = [9000 + list(Bypass).index(reason), *document_ids]
    response = REQUESTS[reason](server, prompt[:800] if reason != Bypass.NO_FREE_SLOTS else prompt)
    tokens = response["meta_info"]["prompt_tokens"]
    expected = {"span_tokens": 0, "kv_tokens": tokens, "reused_tokens": 0, "bypass": reason.value}
    assert metasoft(response) == expected
    assert f'bypass="{reason.value}"' in requests.get(f"{server.url}/metrics", timeout=60).text


@pytest.mark.parametrize("reason", RECORDS, ids=lambda reason: reason.value)
def test_a_record_of_another_server_is_known_by_its_field(reason):
    req = Req("rid", "", array("q", range(800)), SamplingParams(max_new_tokens=4))
    assert bypass_reason(req, load_adapter()) is None
    for name, value in RECORDS[reason].items():
        setattr(req, name, value)
    assert bypass_reason(req, load_adapter()) is reason
