"""A real server's compressed cache against the independent Hugging Face implementation, on real prompts of 1K to 3K."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from sglang_metasoft.data import DOCUMENT
from tests.reference.meta_soft_reference import Reference
from tests.server.checks import SALT, metasoft

pytestmark = pytest.mark.server

PROMPT_TOKENS, SINK, TARGETS = 2048, 4, 4
WINDOWS = {"attention_flow": 64, "key_bias": 16}  # soft tokens are composed from the same tokens in both
# float32 on both sides; kernels differ, so masses that agree to this relative error may swap places at the cut.
MASS_TOLERANCE = 2e-4
ENTRY_TOLERANCE = 2e-4
LOGPROB_TOLERANCE = 2e-3
TOP = 20
RATIO = 4  # where one is enough


@pytest.fixture(scope="session", params=["first layers", pytest.param("all layers", marks=pytest.mark.slow)])
def model_dir(request, model_dir, full_model_dir):
    return full_model_dir if request.param == "all layers" else model_dir


@pytest.fixture(scope="module")
def reference(model_dir, compressor_dir):
    return Reference(model_dir, compressor_dir)


@pytest.fixture(scope="module", params=["attention_flow", "key_bias"])
def served(request, start_server, compressor_dir, tokenizer, tmp_path_factory):
    """A server that writes what it kept, and compresses each chunk of prompts longer than PROMPT_TOKENS."""
    trace_dir, window = tmp_path_factory.mktemp("trace"), WINDOWS[request.param]
    server = start_server(
        "--dtype", "float32", "--enable-metasoft", "--metasoft-path", str(compressor_dir),
        "--metasoft-during-prefill", "--chunked-prefill-size", str(PROMPT_TOKENS), "--metasoft-window", str(window),
        "--metasoft-config", json.dumps({"trace_dir": str(trace_dir), "consolidation": request.param}),
    )  # fmt: skip
    calibration = calibration_ids(tokenizer) if request.param == "key_bias" else None
    return SimpleNamespace(server=server, trace_dir=trace_dir, window=window, calibration=calibration)


def calibration_ids(tokenizer) -> list[int]:
    """The text that `key_bias` fits its directions to."""
    text = DOCUMENT.read_text()
    return tokenizer.encode(text, add_special_tokens=False)[:1024]


def ask(served, ids: list[int], tenant: str, number: int = 1, **params) -> tuple[dict, list[dict]]:
    """A tenant's request of this number; its response, and what it wrote, span by span."""
    rid, params = f"{tenant}_{number}", {"metasoft_ratio": RATIO, **params}
    response = served.server.generate(
        ids, 2, rid=rid, return_logprob=True, top_logprobs_num=TOP, custom_params=params, **{SALT: tenant}
    )
    traces = [load_file(path) for path in served.trace_dir.glob(f"{rid}-*.safetensors")]
    return response, sorted(traces, key=lambda trace: trace["plan"][0].item())


def assert_entries_equal(
    trace: dict, expected, plan: tuple, tolerance: float = ENTRY_TOLERANCE * 10, most_contested: float = 0.2
) -> None:
    """The plan, which entries each head kept, but for near ties at the cut, and what became of them."""
    assert tuple(trace["plan"].tolist()) == plan
    *_, entries, sink, _ = plan
    layers, groups = trace["kept"].shape[:2]
    swapped = 0
    for layer in range(layers):
        for g in range(groups):
            ours, theirs = trace["kept"][layer, g].tolist(), expected.kept[layer][g]
            assert ours == sorted(set(ours)) and len(ours) == entries
            mass = expected.importance[layer][g]
            cut = min(mass[i].item() for i in theirs if i >= sink)
            for entry in set(ours) ^ set(theirs):
                assert abs(mass[entry].item() / cut - 1) < MASS_TOLERANCE, (layer, g, entry)
            swapped += len(set(ours) - set(theirs))
            if ours == theirs:  # other heads' entries follow other indices
                close = dict(atol=tolerance, rtol=ENTRY_TOLERANCE)
                sure = ~expected.contested[layer][g]
                torch.testing.assert_close(trace["key"][layer, :, g], expected.keys[layer][g], **close)
                torch.testing.assert_close(trace["value"][layer, sure, g], expected.values[layer][g][sure], **close)
    # Near ties are allowed above, at the cut and in the routing, but must be the exceptions they are.
    assert swapped <= layers * groups // 20, swapped
    assert torch.stack(expected.contested).float().mean() < most_contested


def assert_first_token_equals(response: dict, logprobs: torch.Tensor) -> None:
    top = response["meta_info"]["output_top_logprobs"][0]
    for logprob, token, _ in top:
        assert abs(logprobs[token].item() - logprob) < LOGPROB_TOLERANCE, token
    assert top[0][1] == logprobs.argmax().item()


@pytest.mark.parametrize("ratio", [4, 8])
def test_a_prompt_with_its_question_and_a_repeat(served, reference, document_ids, ratio):
    ids, span = document_ids[:PROMPT_TOKENS], PROMPT_TOKENS - served.window
    first, (trace,) = ask(served, ids, f"whole{ratio}", metasoft_ratio=ratio)
    assert metasoft(first)["kv_tokens"] == PROMPT_TOKENS // ratio
    entries = PROMPT_TOKENS // ratio - served.window
    expected = reference.compress(ids, served.window, entries, SINK, TARGETS, served.calibration)
    assert_entries_equal(trace, expected, (0, span, entries, SINK, False))
    again, _ = ask(served, ids, f"whole{ratio}", 2, metasoft_ratio=ratio)
    assert metasoft(again)["reused_tokens"] == span
    assert_first_token_equals(again, reference.next_token_logprobs(ids, span, expected))


def test_both_sides_of_a_boundary_and_the_next_turn(served, reference, document_ids):
    """The first span is probed as if nothing followed, the second over its entries, the third over both's."""
    ids, boundary = document_ids[100:1400], 640
    first, traces = ask(served, ids, "sides", metasoft_boundary=boundary)
    options = dict(targets=TARGETS, calibration=served.calibration)
    head = reference.compress_span(
        reference.prefill(ids), boundary, boundary // RATIO, SINK, at_boundary=True, **options
    )
    assert_entries_equal(traces[0], head, (0, boundary, boundary // RATIO, SINK, True))
    start, span = boundary // RATIO, len(ids) - boundary - served.window
    entries = len(ids) // RATIO - start - served.window
    tail = reference.compress_span(head.cache, span, entries, 0, **options)
    assert_entries_equal(traces[1], tail, (start, span, entries, 0, False))

    more = document_ids[2000:2700]
    cache, logprobs = reference.extend(tail.cache, first["output_ids"][:1])
    assert logprobs.argmax().item() == first["output_ids"][1]
    cache, logprobs = reference.extend(cache, first["output_ids"][1:] + more)
    turn, (trace,) = ask(served, cache.ids, "sides", 2, metasoft_boundary=boundary)
    assert metasoft(turn)["reused_tokens"] == len(ids) - served.window
    assert_first_token_equals(turn, logprobs)
    start, span = start + entries, len(cache.ids) - len(ids)
    entries = -(-len(cache.ids) // RATIO) - start - served.window
    expected = reference.compress_span(cache, span, entries, 0, **options)
    assert_entries_equal(trace, expected, (start, span, entries, 0, False))


def test_chunks_compressed_while_the_prompt_is_prefilled(served, reference, document_ids):
    """The second chunk is computed over the first one's consolidated entries, and so is the answer."""
    ids, options = document_ids[: PROMPT_TOKENS + 600], dict(targets=TARGETS, calibration=served.calibration)
    response, traces = ask(served, ids, "chunks")
    span, entries = PROMPT_TOKENS - served.window, PROMPT_TOKENS // RATIO - served.window
    first = reference.compress_span(reference.prefill(ids[:PROMPT_TOKENS]), span, entries, SINK, **options)
    assert_entries_equal(traces[0], first, (0, span, entries, SINK, False))
    cache, logprobs = reference.extend(first.cache, ids[PROMPT_TOKENS:])
    assert_first_token_equals(response, logprobs)
    more = len(ids) // RATIO - entries - served.window
    second = reference.compress_span(cache, len(ids) - PROMPT_TOKENS, more, 0, **options)
    assert_entries_equal(traces[1], second, (entries, len(ids) - PROMPT_TOKENS, more, 0, False))


def compare_entries(trace: dict, expected) -> tuple[float, float]:
    """How far a trace is from the reference, where numbers are too coarse to agree exactly.

    Returns:
        Share of kept entries in common, and the largest, over heads, of the median relative error of an entry's K and V
        (heads that chose the same entries alone).
    """
    layers, groups, entries = trace["kept"].shape
    common, errors = 0, [0.0]
    for layer in range(layers):
        for g in range(groups):
            ours, theirs = trace["kept"][layer, g].tolist(), expected.kept[layer][g]
            common += len(set(ours) & set(theirs))
            if ours == theirs:
                for name, there in (("key", expected.keys), ("value", expected.values)):
                    here, there = trace[name][layer, :, g].float(), there[layer][g]
                    errors.append(((here - there).norm(dim=-1) / there.norm(dim=-1)).median().item())
    return common / (layers * groups * entries), max(errors)
