"""The count of KV bytes by token: against sums by hand, and who is refused is who would be at a start."""

import runpy
from pathlib import Path

import pytest
import torch
from metasoft_patches import families

from sglang_metasoft.hf.shape import kv_bytes_per_entry
from sglang_metasoft.types import ModelShape

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "kv_bytes.py"))
MODELS = {model.model: model for model in SCRIPT["read_models"]()}


def test_full_layers_hold_what_the_estimate_of_a_server_counts():
    shape = ModelShape("", 0, 0, num_layers=80, num_heads=64, num_kv_heads=8, head_dim=128)
    model = MODELS["Llama-3.3-70B"]
    assert model.held_bytes(1) == kv_bytes_per_entry(shape, torch.bfloat16) == 320 * 1024
    assert model.held_bytes(1001, 4) == 251 * 320 * 1024


@pytest.mark.parametrize(
    ("name", "tokens", "ratio", "entries"),
    [
        ("Gemma-3-27B", 32768, 8, 4096 * 62),
        ("Gemma-3-27B", 2048, 4, 1024 * 62),  # no fewer than the window
        ("Gemma-3-27B", 512, 1, 512 * 62),
        ("gpt-oss-20b", 32768, 4, 8192 * 12 + 128 * 12),  # windows have a pool of their own
        ("gpt-oss-20b", 100, 1, 100 * 24),
        ("Qwen3-Next-80B-A3B", 4096, 4, 1024 * 12),  # recurrent layers hold none
    ],
)
def test_layers_count_by_their_kind(name, tokens, ratio, entries):
    model = MODELS[name]
    assert model.held_bytes(tokens, ratio) == entries * model.entry_bytes


def test_a_row_says_refused_where_a_start_would():
    rows = [row for row in SCRIPT["table"](4096, (4,)).splitlines()[2:]]
    assert len(rows) == len(MODELS)
    for row, model in zip(rows, MODELS.values(), strict=True):
        assert model.class_name in families.BY_CLASS
        assert row.endswith("| refused |") is (model.why_refused() is not None)
    assert MODELS["DeepSeek-V3"].why_refused() == families.LATENT
    assert MODELS["OLMo-2-1124-7B"].why_refused() is None
