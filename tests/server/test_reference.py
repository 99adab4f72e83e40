"""A real server's compressed cache against the independent Hugging Face implementation, on a real 2K prompt."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sglang_metasoft.soft_tokens import SoftTokens
from sglang_metasoft.types import ModelShape

pytestmark = pytest.mark.server

PROMPT_TOKENS, WINDOW, SINK, TARGETS = 2048, 64, 4, 4
# float32 on both sides; kernels differ, so masses that agree to this relative error may swap places at the cut.
MASS_TOLERANCE = 2e-4
ENTRY_TOLERANCE = 2e-4
LOGPROB_TOLERANCE = 2e-3
TOP = 20


def load_reference(model_dir, compressor_dir):
    path = Path(__file__).parents[1] / "reference" / "meta_soft_reference.py"
    spec = importlib.util.spec_from_file_location("meta_soft_reference", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Reference(model_dir, compressor_dir)


@pytest.fixture(scope="module")
def compressor_dir(model_dir, tmp_path_factory):
    """A compressor written to disk, as training would; its weights are random, its gates not all one."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    cfg = model.config
    shape = ModelShape(
        str(model_dir), cfg.vocab_size, cfg.hidden_size, cfg.num_hidden_layers,
        cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim,
    )  # fmt: skip
    table = model.get_input_embeddings()
    soft = SoftTokens.untrained(shape, 16, lambda ids: table(ids).detach(), torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    soft.gate_scale.copy_(torch.rand(soft.gate_scale.shape, generator=generator))
    soft.trunk.bias.copy_(torch.randn(soft.trunk.bias.shape, generator=generator))
    folder = tmp_path_factory.mktemp("compressor")
    soft.save(folder, shape)
    return folder


@pytest.fixture(scope="module")
def served(start_server, compressor_dir, document_ids, tmp_path_factory):
    """The prompt at both ratios: kept indices and entries from the server's trace, log-probabilities of a repeat."""
    trace_dir = tmp_path_factory.mktemp("trace")
    server = start_server(
        "--dtype", "float32", "--enable-metasoft", "--metasoft-path", str(compressor_dir),
        "--metasoft-config", json.dumps({"trace_dir": str(trace_dir)}),
    )  # fmt: skip
    ids = document_ids[:PROMPT_TOKENS]
    results = {}
    for ratio in (4, 8):
        params = {"custom_params": {"metasoft_ratio": ratio}}
        first = server.generate(ids, 2, rid=f"first{ratio}", **params)
        again = server.generate(ids, 2, return_logprob=True, top_logprobs_num=TOP, **params)
        assert first["meta_info"]["metasoft_kv_tokens"] == PROMPT_TOKENS // ratio
        assert again["meta_info"]["metasoft_reused_tokens"] == PROMPT_TOKENS - WINDOW
        (trace,) = trace_dir.glob(f"first{ratio}-*.safetensors")
        results[ratio] = load_file(trace), again["meta_info"]["output_top_logprobs"][0]
    return ids, results


@pytest.mark.parametrize("ratio", [4, 8])
def test_server_equals_reference(served, model_dir, compressor_dir, ratio):
    ids, results = served
    trace, top_logprobs = results[ratio]
    reference = load_reference(model_dir, compressor_dir)
    entries = PROMPT_TOKENS // ratio - WINDOW
    expected = reference.compress(ids, WINDOW, entries, SINK, TARGETS)
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
    logprobs = reference.next_token_logprobs(ids, PROMPT_TOKENS - WINDOW, expected)
    for logprob, token, _ in top_logprobs:
        assert abs(logprobs[token].item() - logprob) < LOGPROB_TOLERANCE, token
    assert top_logprobs[0][1] == logprobs.argmax().item()
