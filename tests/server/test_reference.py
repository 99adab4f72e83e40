"""A real server's compressed cache against the independent Hugging Face implementation, on a real 2K prompt."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sglang_metasoft
from tests.reference.meta_soft_reference import Reference

pytestmark = pytest.mark.server

PROMPT_TOKENS, SINK, TARGETS = 2048, 4, 4
WINDOWS = {"attention_flow": 64, "key_bias": 16}  # soft tokens are composed from the same tokens in both
# float32 on both sides; kernels differ, so masses that agree to this relative error may swap places at the cut.
MASS_TOLERANCE = 2e-4
ENTRY_TOLERANCE = 2e-4
LOGPROB_TOLERANCE = 2e-3
TOP = 20


@pytest.fixture(scope="session")
def model_dir(full_model_dir):
    return full_model_dir


@pytest.fixture(scope="module", params=["attention_flow", "key_bias"])
def served(request, start_server, compressor_dir, document_ids, tmp_path_factory):
    """The prompt at both ratios: kept indices and entries from the server's trace, log-probabilities of a repeat."""
    trace_dir = tmp_path_factory.mktemp("trace")
    server = start_server(
        "--dtype", "float32", "--enable-metasoft", "--metasoft-path", str(compressor_dir),
        "--metasoft-window", str(WINDOWS[request.param]),
        "--metasoft-config", json.dumps({"trace_dir": str(trace_dir), "consolidation": request.param}),
    )  # fmt: skip
    ids = document_ids[:PROMPT_TOKENS]
    results = {}
    for ratio in (4, 8):
        params = {"custom_params": {"metasoft_ratio": ratio}}
        first = server.generate(ids, 2, rid=f"first{ratio}", **params)
        again = server.generate(ids, 2, return_logprob=True, top_logprobs_num=TOP, **params)
        assert first["meta_info"]["metasoft_kv_tokens"] == PROMPT_TOKENS // ratio
        assert again["meta_info"]["metasoft_reused_tokens"] == PROMPT_TOKENS - WINDOWS[request.param]
        (trace,) = trace_dir.glob(f"first{ratio}-*.safetensors")
        results[ratio] = load_file(trace), again["meta_info"]["output_top_logprobs"][0]
    return request.param, ids, results


def calibration_ids(tokenizer) -> list[int]:
    """The text that `key_bias` fits its directions to."""
    text = (Path(sglang_metasoft.__file__).parent / "demo" / "document.txt").read_text()
    return tokenizer.encode(text, add_special_tokens=False)[:1024]


@pytest.mark.parametrize("ratio", [4, 8])
def test_server_equals_reference(served, model_dir, compressor_dir, tokenizer, ratio):
    consolidation, ids, results = served
    trace, top_logprobs = results[ratio]
    reference = Reference(model_dir, compressor_dir)
    window = WINDOWS[consolidation]
    entries = PROMPT_TOKENS // ratio - window
    calibration = calibration_ids(tokenizer) if consolidation == "key_bias" else None
    expected = reference.compress(ids, window, entries, SINK, TARGETS, calibration)
    layers, groups = trace["kept"].shape[:2]
    swapped = 0
    for layer in range(layers):
        for g in range(groups):
            ours, theirs = trace["kept"][layer, g].tolist(), expected.kept[layer][g]
            assert ours == sorted(set(ours)) and len(ours) == entries
            mass = expected.importance[layer][g]
            cut = min(mass[i].item() for i in theirs if i >= SINK)
            for entry in set(ours) ^ set(theirs):
                assert abs(mass[entry].item() / cut - 1) < MASS_TOLERANCE, (layer, g, entry)
            swapped += len(set(ours) - set(theirs))
            if ours == theirs:  # other heads' entries follow other indices
                close = dict(atol=ENTRY_TOLERANCE * 10, rtol=ENTRY_TOLERANCE)
                sure = ~expected.contested[layer][g]
                torch.testing.assert_close(trace["key"][layer, :, g], expected.keys[layer][g], **close)
                torch.testing.assert_close(trace["value"][layer, sure, g], expected.values[layer][g][sure], **close)
    # Near ties are allowed above, at the cut and in the routing, but must be the exceptions they are.
    assert swapped <= layers * groups // 20, swapped
    assert torch.stack(expected.contested).float().mean() < 0.2
    logprobs = reference.next_token_logprobs(ids, PROMPT_TOKENS - window, expected)
    for logprob, token, _ in top_logprobs:
        assert abs(logprobs[token].item() - logprob) < LOGPROB_TOLERANCE, token
    assert top_logprobs[0][1] == logprobs.argmax().item()


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
