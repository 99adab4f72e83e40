"""Soft tokens: orthonormal library, determinism, and a compressor's files."""

import inspect
import json

import pytest
import torch
from safetensors.torch import save_file

from sglang_metasoft.compressor.files import SIZES, check_compressor, tensor_shapes
from sglang_metasoft.compressor.soft_tokens import SoftTokens
from sglang_metasoft.types import ModelShape

SHAPE = ModelShape("tiny", vocab_size=1000, hidden_size=48, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=12)
CPU = torch.device("cpu")


@pytest.fixture
def embed():
    table = torch.randn(1000, 48, generator=torch.Generator().manual_seed(3))
    return lambda ids: table[ids]


@pytest.fixture
def soft(embed):
    return SoftTokens.untrained(SHAPE, 8, embed, CPU)


@pytest.fixture
def folder(soft, tmp_path):
    soft.save(tmp_path / "compressor", SHAPE)
    return tmp_path / "compressor"


def ids(seed, length=100):
    return torch.randint(1000, (length,), generator=torch.Generator().manual_seed(seed))


def test_library_rows_are_orthonormal(soft):
    assert soft.library.shape == (48, 48)  # M = min(512, D)
    torch.testing.assert_close(soft.library @ soft.library.t(), torch.eye(48), atol=1e-5, rtol=0)


def test_untrained_soft_tokens_are_deterministic_and_depend_on_the_prompt(soft, embed):
    again = SoftTokens.untrained(SHAPE, 8, embed, CPU)
    assert again.fingerprint == soft.fingerprint
    first = soft(embed, ids(1), ids(2, 10))
    assert first.shape == (8, 48) and torch.equal(first, again(embed, ids(1), ids(2, 10)))
    assert not torch.allclose(first, soft(embed, ids(4), ids(2, 10)))
    assert not torch.allclose(first, soft(embed, ids(1), ids(5, 10)))


def test_each_soft_token_is_a_convex_mix_of_few_rows(soft, embed):
    weights = soft(embed, ids(1), ids(2, 10)) / soft.norm @ soft.library.t()
    torch.testing.assert_close(weights.sum(1), torch.ones(8), atol=1e-4, rtol=0)
    assert ((weights > 1e-6).sum(1) <= 8).all() and (weights > -1e-5).all()


def test_long_spans_are_embedded_in_blocks(soft, embed, monkeypatch):
    whole = soft.features(embed, ids(1), ids(2, 10))
    monkeypatch.setattr("sglang_metasoft.compressor.soft_tokens.EMBED_BLOCK_TOKENS", 7)
    torch.testing.assert_close(soft.features(embed, ids(1), ids(2, 10)), whole)


def test_a_saved_compressor_loads_as_it_was(soft, folder, embed):
    loaded = SoftTokens.load(str(folder), SHAPE, embed, CPU)
    assert loaded.fingerprint == soft.fingerprint
    assert torch.equal(loaded(embed, ids(1), ids(2, 10)), soft(embed, ids(1), ids(2, 10)))


def test_only_known_safe_files_are_read(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"])
def test_another_size_or_head_layout_is_refused_with_both_named(folder, field):
    other = SHAPE._replace(name="other-model", **{field: 7})
    with pytest.raises(ValueError, match="trained for 'tiny' .* served model 'other-model'") as error:
        check_compressor(str(folder), other)
    assert f"{field} {getattr(SHAPE, field)} there, 7 here" in str(error.value)


def test_another_model_of_the_same_size_is_refused(folder, embed):
    with pytest.raises(ValueError, match="trained for 'tiny', whose embedding table is not that of"):
        SoftTokens.load(str(folder), SHAPE, lambda ids: torch.randn(len(ids), 48), CPU)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"lacks {name}"):
        check_compressor(str(folder), SHAPE)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"format": "x"}',
        '{"format": 1, "model": {}, "sizes": {}}',
        '{"format": null, "model": []}',
    ],
)
def test_a_damaged_configuration_is_refused(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json is no compressor configuration"):
        check_compressor(str(folder), SHAPE)


def test_an_unknown_format_is_refused(folder):
    config = json.loads((folder / "config.json").read_text()) | {"format": "metasoft-compressor-9"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="format 'metasoft-compressor-9'; allowed: 'metasoft-compressor-2'"):
        check_compressor(str(folder), SHAPE)


@pytest.mark.parametrize("keep", [0, 1, 100, 5000])
def test_a_truncated_weights_file_is_refused(folder, embed, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    for read in (lambda: check_compressor(str(folder), SHAPE), lambda: SoftTokens.load(str(folder), SHAPE, embed, CPU)):
        with pytest.raises(ValueError, match="model.safetensors cannot be read"):
            read()


def test_weights_that_lack_a_tensor_are_refused(folder, embed):
    save_file({"library": torch.zeros(48, 48)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="cannot be read: lacks bias, embedding_check, "):
        SoftTokens.load(str(folder), SHAPE, embed, CPU)


def test_a_path_that_is_neither_folder_nor_hub_id_is_refused(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="'no/such' is no directory, not shipped .*, and could not be downloaded"):
        check_compressor("no/such", SHAPE)


@pytest.mark.parametrize("scorer", [0, 19])
def test_the_format_is_what_the_module_holds(scorer):
    """Written out as data in ``files.py``: a file is checked against it before any tensor is read."""
    sizes = dict(
        hidden_size=11, rows=7, count=5, num_layers=3, num_kv_heads=2, trunk=13, query=17, top=4, scorer=scorer,
        head_dim=23,
    )  # fmt: skip
    assert tuple(sizes) == SIZES["metasoft"] == tuple(inspect.signature(SoftTokens).parameters)
    held = {name: tuple(tensor.shape) for name, tensor in SoftTokens(**sizes).state_dict().items()}
    assert tensor_shapes("metasoft", sizes) == held
