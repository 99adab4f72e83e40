"""Static soft tokens: the files of ``judge_q``."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sglang_metasoft.compressor.files import check_compressor
from sglang_metasoft.compressor.soft_tokens import SoftTokens
from sglang_metasoft.compressor.static_tokens import StaticTokens
from sglang_metasoft.config import MetaSoftConfig
from sglang_metasoft.methods import load_method
from sglang_metasoft.types import ModelShape, Prompt

SHAPE = ModelShape("tiny", vocab_size=1000, hidden_size=48, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=12)
CPU = torch.device("cpu")
TABLE = torch.randn(1000, 48, generator=torch.Generator().manual_seed(3))
WEIGHTS = "model.safetensors"


def embed(ids):
    return TABLE[ids]


@pytest.fixture
def tokens():
    return StaticTokens(torch.randn(8, 48))


@pytest.fixture
def folder(tokens, tmp_path):
    tokens.save(tmp_path / "static", SHAPE, embed)
    return tmp_path / "static"


def test_what_is_saved_is_what_probes_every_prompt(tokens, folder):
    config = MetaSoftConfig(method="judge_q", path=str(folder))
    judge = load_method("judge_q")
    judge.check(config, SHAPE, 1)
    method = judge(config, SHAPE, embed, CPU)
    for length in (100, 200):
        ids = torch.arange(length)
        probe = method.probe(Prompt(ids[:50], ids[50:], length, length))
        assert torch.equal(probe.embeds, tokens.tokens)
        assert probe.context_slots == probe.first_position == length
    assert method.identity == f"JudgeQ:{tokens.fingerprint}"
    assert StaticTokens(tokens.tokens + 1).fingerprint != tokens.fingerprint


def test_the_folder_holds_the_agreed_files(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["method"] == "judge_q"
    assert config["sizes"] == {"hidden_size": 48, "count": 8, "num_layers": 3, "num_kv_heads": 2}
    assert {name: list(tensor.shape) for name, tensor in load_file(folder / WEIGHTS).items()} == {
        "static_tokens": [8, 48],
        "embedding_check": [32, 48],
    }


def test_a_compressor_for_another_method_is_refused_either_way(folder, tmp_path):
    with pytest.raises(ValueError, match="trained for method 'judge_q'; the server's is 'metasoft'"):
        check_compressor(str(folder), SHAPE)
    SoftTokens.untrained(SHAPE, 8, embed, CPU).save(tmp_path / "dynamic", SHAPE)
    with pytest.raises(ValueError, match="trained for method 'metasoft'; the server's is 'judge_q'"):
        StaticTokens.load(str(tmp_path / "dynamic"), SHAPE, embed, CPU)


def test_another_model_of_the_same_size_is_refused(folder):
    with pytest.raises(ValueError, match="trained for 'tiny', whose embedding table is not that of"):
        StaticTokens.load(str(folder), SHAPE, lambda ids: torch.randn(len(ids), 48), CPU)


def test_another_size_is_refused(folder):
    with pytest.raises(ValueError, match="num_layers 3 there, 4 here"):
        StaticTokens.load(str(folder), SHAPE._replace(num_layers=4), embed, CPU)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"static_tokens": torch.zeros(7, 48)}, r"static_tokens has shape \[7, 48\]; allowed: \[8, 48\]"),
        ({"static_tokens": torch.full((8, 48), torch.nan)}, "static_tokens has values that are not finite"),
        ({"static_tokens": torch.zeros(8, 48, dtype=torch.int32)}, "static_tokens has dtype .I32."),
        ({"static_tokens": None}, "lacks static_tokens"),
        ({"embedding_check": None}, "lacks embedding_check"),
    ],
)
def test_bad_weights_are_named(folder, changes, words):
    weights = {name: tensor for name, tensor in (load_file(folder / WEIGHTS) | changes).items() if tensor is not None}
    save_file(weights, folder / WEIGHTS)
    with pytest.raises(ValueError, match=words):
        StaticTokens.load(str(folder), SHAPE, embed, CPU)
