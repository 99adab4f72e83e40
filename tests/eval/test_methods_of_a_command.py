"""Methods as the command line names them."""

import math

import pytest
import torch
from safetensors.torch import load_file

from sglang_metasoft.cli import main
from sglang_metasoft.compressor.files import SHIPPED
from sglang_metasoft.config import MetaSoftConfig
from sglang_metasoft.eval.hf import MethodSpec
from sglang_metasoft.eval.records import read_records
from sglang_metasoft.eval.variants import VARIANTS
from sglang_metasoft.types import Job, LayerPool, LayerView, ModelShape, Plan, Probe


@pytest.mark.parametrize(
    ("text", "name", "consolidation", "path", "settings"),
    [
        ("snapkv", "snapkv", None, None, {}),
        ("metasoft+none@runs/a:b", "metasoft", "none", "runs/a:b", {}),
        ("metasoft:route_band=64,gate_scale=0.5@x", "metasoft", None, "x", {"route_band": 64, "gate_scale": 0.5}),
        ("oracle+zeromerge:sink=0", "oracle", "zeromerge", None, {"sink": 0}),
    ],
)
def test_a_method_with_its_settings(text, name, consolidation, path, settings):
    assert MethodSpec.parse(text) == MethodSpec(text, name, consolidation, path, settings)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("metasoft:rout_band=3", "rout_band.*route_band"),
        ("metasoft:route_band=0", "0 is not allowed.*>= 1"),
        ("metasoft:route_band", "not JSON"),
        ('metasoft:method="snapkv"', "method has a place of its own.*NAME"),
    ],
)
def test_a_bad_setting_is_named(text, words):
    with pytest.raises(ValueError, match=words):
        MethodSpec.parse(text)


def test_methods_of_different_windows_keep_their_own_in_one_run(model_dir, data_folder, tmp_path):
    path = tmp_path / "windows.jsonl"
    command = ["eval-hf", "--model", str(model_dir), "--methods", "streaming_llm:window=16", "streaming_llm:window=128"]
    command += ["--tasks", "niah_single_1", "--lengths", "900", "--ratios", "4", "--modes", "inside", "--cases", "1"]
    assert main([*command, "--data", str(data_folder), "--output", str(path)]) == 0
    found = [record for record in read_records(path) if record["method"] != "full"]
    assert len(found) == 2
    for record in found:
        assert record["kv_tokens"] == math.ceil(record["prompt_tokens"] / 4), record["method"]


def make_view(method, t=5, heads=6, span=40):
    slots = torch.randperm(span)
    pool = LayerPool(torch.randn(span, 3, 8), torch.randn(span, 3, 8), 0.3, 1.0, 1.0)
    job = Job(Plan(0, span, 10, 4, False), Probe(torch.empty(t, 48), span, span), slots, slots, slots[:10])
    return LayerView(job, pool, torch.randn(t, heads, 8), torch.full((t, heads), 4.0), 0)


def test_other_ways_to_take_importance():
    bare = type("Soft", (), {"scorer": None})
    views, scores = None, {}
    for name in ("metasoft_max", "metasoft_pooled"):
        method = VARIANTS[name].__new__(VARIANTS[name])
        method.config, method.soft_tokens = MetaSoftConfig(), bare
        views = views or make_view(method)
        scores[name] = method.score_layer(views)
    keys = views.pool.key[views.job.span_slots]
    logits = torch.einsum("tgrd,sgd->gtrs", views.q.view(5, 3, 2, 8), keys) * 0.3
    attention = (logits - 4).exp().mean(2)  # [G, t, S]
    torch.testing.assert_close(scores["metasoft_max"].importance, attention.amax(1))
    mean = attention.mean(1)
    expected = torch.stack([mean[:, max(0, n - 3) : n + 4].amax(1) for n in range(40)], 1)
    torch.testing.assert_close(scores["metasoft_pooled"].importance, expected)
    torch.testing.assert_close(scores["metasoft_pooled"].mass, mean)


def test_an_entry_scorer_would_undo_them():
    shape = ModelShape("smol", 49152, 576, 30, 9, 3, 64)
    rows = load_file(SHIPPED / "smollm2-135m-instruct" / "model.safetensors")["embedding_check"].float()
    with pytest.raises(ValueError, match="smollm2-135m-instruct.*entry scorer.*--scorer-width 0"):
        VARIANTS["metasoft_max"](
            MetaSoftConfig(path="smollm2-135m-instruct"), shape, lambda ids: rows, torch.device("cpu")
        )
