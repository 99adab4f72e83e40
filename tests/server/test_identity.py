"""With ratio 1 the whole machinery runs and keeps everything: the output must be that of plain SGLang, token for token.

float32, because plain SGLang itself flips near ties in bf16 when other requests happen to share a batch.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.server.checks import SOFT_TOKENS

pytestmark = pytest.mark.server

PROMPTS = 20
WINDOW = 64
NEW_TOKENS = 10
FLAGS = ["--dtype", "float32"]
METASOFT = [*SOFT_TOKENS, "--metasoft-ratio", "1"]


def make_prompts(document_ids: list[int]) -> list[list[int]]:
    """20 prompts of 1K to 4K tokens, many short ones and few long; every second one starts like the others do."""
    prompts = []
    for number in range(PROMPTS):
        length = 1000 + 3000 * number**4 // (PROMPTS - 1) ** 4
        start = 0 if number % 2 else number * 29
        prompts.append(document_ids[start : start + length])
    return prompts


def converse(server, prompts: list[list[int]], tokenizer) -> list[tuple[dict, dict]]:
    """Two turns of every prompt, five conversations at a time; returns both responses of each."""
    question = tokenizer("\nWhat else did he say?")["input_ids"]

    def two_turns(prompt):
        first = server.generate(prompt, NEW_TOKENS)
        return first, server.generate(prompt + first["output_ids"] + question, NEW_TOKENS)

    with ThreadPoolExecutor(5) as pool:
        return list(pool.map(two_turns, prompts))


def outputs(turns: list[tuple[dict, dict]]) -> list[list[list[int]]]:
    return [[response["output_ids"] for response in pair] for pair in turns]


@pytest.fixture(scope="module", params=["first layers", pytest.param("all layers", marks=pytest.mark.slow)])
def model_dir(request, model_dir, full_model_dir):
    return full_model_dir if request.param == "all layers" else model_dir


@pytest.fixture(scope="module")
def prompts(document_ids):
    return make_prompts(document_ids)


@pytest.fixture(scope="module")
def plain_outputs(start_server, prompts, tokenizer):
    return outputs(converse(start_server(*FLAGS), prompts, tokenizer))


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "no-overlap"])
def test_ratio_one_equals_plain_sglang(plain_outputs, start_server, prompts, tokenizer, overlap):
    server = start_server(*FLAGS, *METASOFT, *([] if overlap else ["--disable-overlap-schedule"]))
    turns = converse(server, prompts, tokenizer)
    for prompt, (first, second) in zip(prompts, turns, strict=True):
        first_meta, second_meta = first["meta_info"], second["meta_info"]
        # A prompt that continues an already compressed one may leave a rest too short for a segment of its own.
        span = first_meta["metasoft_span_tokens"]
        assert span == len(prompt) - WINDOW or first_meta["metasoft_reused_tokens"] == span
        assert second_meta["metasoft_reused_tokens"] >= span
        # The second turn computes the new tokens alone: everything before, but for the last output, is cached.
        new_tokens = second_meta["prompt_tokens"] - len(prompt) - NEW_TOKENS
        assert second_meta["prompt_tokens"] - second_meta["cached_tokens"] <= new_tokens + 1
    assert outputs(turns) == plain_outputs


def test_segments_pages_and_chunks_equal_plain_sglang_too(plain_outputs, start_server, prompts, tokenizer):
    """Every prefill chunk becomes a segment of its own: positions stay logical past several of them."""
    server = start_server(
        *FLAGS, *METASOFT, "--metasoft-during-prefill", "--metasoft-min-tokens", "128", "--page-size", "16",
        "--chunked-prefill-size", "512", "--enable-mixed-chunk",
    )  # fmt: skip
    some = slice(0, PROMPTS, 3)
    turns = converse(server, prompts[some], tokenizer)
    for prompt, (first, second) in zip(prompts[some], turns, strict=True):
        span, reused = (first["meta_info"][f"metasoft_{name}_tokens"] for name in ("span", "reused"))
        # A prefix taken over from a longer prompt with the same head may reach into this prompt's window.
        assert span == reused or WINDOW <= len(prompt) - span
        assert len(prompt) - span < WINDOW + 128 + 16
        assert second["meta_info"]["metasoft_reused_tokens"] >= span
    assert outputs(turns) == plain_outputs[some]
