"""Every method in a real server: compresses, a repeat reuses it, nothing leaks; bad combinations are refused."""

import json

import pytest
import torch

from sglang_metasoft.compressor.static_tokens import StaticTokens
from sglang_metasoft.config import CONSOLIDATIONS, METHODS
from sglang_metasoft.hf.shape import read_shape
from tests.server.checks import STRICT_CHECKS, assert_pool_is_whole, metasoft

pytestmark = pytest.mark.server

POOL_TOKENS = 8192
PROMPT_TOKENS, WINDOW = 1600, 64
# Every consolidation with two methods.
PAIRS = {name: list(CONSOLIDATIONS)[number % len(CONSOLIDATIONS)] for number, name in enumerate(METHODS, start=1)}
# One that spares the model's run, one that asks the loaded model at start-up.
FAST = {"streaming_llm": "attention_flow", "q_filters": "least_squares"}


@pytest.fixture(scope="module")
def static_dir(model_dir, tmp_path_factory):
    """Static soft tokens on disk, as training writes them: rows of the embedding table."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    shape = read_shape(model_dir)
    table = model.get_input_embeddings().weight.detach()
    folder = tmp_path_factory.mktemp("static")
    StaticTokens(table[1000:1032].clone()).save(folder, shape, lambda ids: table[ids])
    return folder


def serve(start_server, method: str, consolidation: str, *flags: str):
    return start_server(
        "--enable-metasoft", "--metasoft-method", method, "--metasoft-config",
        json.dumps({"consolidation": consolidation}), "--enable-metrics", "--max-total-tokens", str(POOL_TOKENS),
        *flags, env=STRICT_CHECKS,
    )  # fmt: skip


def check(server, document_ids: list[int]) -> None:
    ids = document_ids[:PROMPT_TOKENS]
    first = server.generate(ids, 8)
    span = PROMPT_TOKENS - WINDOW
    assert metasoft(first) == {"span_tokens": span, "kv_tokens": PROMPT_TOKENS // 4, "reused_tokens": 0}
    again = server.generate(ids, 8)
    assert metasoft(again)["reused_tokens"] == span and again["meta_info"]["cached_tokens"] == PROMPT_TOKENS - 1
    at_boundary = server.generate(document_ids[2000:3600], 8, custom_params={"metasoft_boundary": 1200})
    assert metasoft(at_boundary)["span_tokens"] >= 1200
    assert_pool_is_whole(server, POOL_TOKENS)


@pytest.mark.parametrize(("method", "consolidation"), FAST.items())
def test_two_methods_serve(start_server, document_ids, method, consolidation):
    check(serve(start_server, method, consolidation), document_ids)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "consolidation"), PAIRS.items())
def test_every_method_serves(start_server, document_ids, static_dir, method, consolidation):
    flags = ["--metasoft-path", str(static_dir)] if method == "judge_q" else []
    check(serve(start_server, method, consolidation, *flags), document_ids)
