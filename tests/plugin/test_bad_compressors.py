"""Damaged compressors, found by hypothesis: each is refused with a ValueError that names its path, or still works."""

import json
import math
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st
from safetensors.torch import load, save

from sglang_metasoft.compressor.files import check_compressor
from sglang_metasoft.compressor.soft_tokens import SoftTokens
from sglang_metasoft.types import ModelShape
from tests.plugin.searching import edges, search, values

SHAPE = ModelShape("tiny", vocab_size=64, hidden_size=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4)
CPU = torch.device("cpu")
TABLE = torch.randn(64, 8, generator=torch.Generator().manual_seed(3))
FILES = ("config.json", "model.safetensors")
SIZES = ("hidden_size", "rows", "count", "num_layers", "num_kv_heads", "trunk", "query", "top")
DTYPES = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool, torch.complex64)


def embed(ids):
    return TABLE[ids]


def saved_files():
    with tempfile.TemporaryDirectory() as folder:
        SoftTokens.untrained(SHAPE, 2, embed, CPU).save(Path(folder), SHAPE)
        return {name: (Path(folder) / name).read_bytes() for name in FILES}


SAVED = saved_files()
CONFIG = json.loads(SAVED["config.json"])
WEIGHTS = load(SAVED["model.safetensors"])
SHAPES = {name: tensor.shape for name, tensor in WEIGHTS.items()}
HEADER_END = 8 + int.from_bytes(SAVED["model.safetensors"][:8], "little")


def with_config(change):
    return {"config.json": json.dumps(change).encode()}


def with_entry(path, value):
    """The configuration with one entry replaced; ``KeyError``: removed."""
    config = json.loads(SAVED["config.json"])
    entry = config
    for key in path[:-1]:
        entry = entry[key]
    if value is KeyError:
        entry.pop(path[-1], None)
    else:
        entry[path[-1]] = value
    return with_config(config)


def with_flipped(position, bits):
    data = bytearray(SAVED["model.safetensors"])
    data[position] ^= bits
    return {"model.safetensors": bytes(data)}


def with_header(name, field, value):
    """One field of one tensor's header entry replaced, the data left alone."""
    data = SAVED["model.safetensors"]
    header = json.loads(data[8:HEADER_END])
    header[name][field] = value
    text = json.dumps(header).encode()
    return {"model.safetensors": len(text).to_bytes(8, "little") + text + data[HEADER_END:]}


def with_tensor(name, tensor):
    weights = {key: value for key, value in WEIGHTS.items() if key != name or tensor is not None}
    return {"model.safetensors": save(weights if tensor is None else weights | {name: tensor})}


def with_value(name, index, value):
    tensor = WEIGHTS[name].clone()
    tensor.view(-1)[index % tensor.numel()] = value
    return with_tensor(name, tensor)


tensors = st.sampled_from(sorted(WEIGHTS))
sizes = st.sampled_from([0, 1, 2, 3, 8, 9, 65536, 65537, 2**31, 2**63, 10**30, -1, True, 2.0, 2.5, "2", None])
size_entries = st.tuples(st.just("sizes"), st.sampled_from(SIZES))
entries = st.one_of(
    size_entries,
    st.tuples(st.just("sizes") | st.just("model"), st.text(max_size=5)),
    st.tuples(st.just("model"), st.sampled_from(SHAPE._fields)),
    st.tuples(st.sampled_from(["format", "model", "sizes", "more"])),
)
file_kinds = st.sampled_from([None, "folder"]) | st.binary(max_size=40)


def cuts_of(name):
    return st.integers(0, len(SAVED[name]) - 1).map(lambda end: {name: SAVED[name][:end]})


config_damages = st.one_of(
    st.builds(with_entry, size_entries, sizes),
    st.builds(with_entry, entries, sizes | edges | st.just(KeyError)),
    st.builds(with_entry, entries, values),
    st.builds(with_config, values),
    cuts_of("config.json"),
    file_kinds.map(lambda kind: {"config.json": kind}),
)
weights_damages = st.one_of(
    cuts_of("model.safetensors"),
    file_kinds.map(lambda kind: {"model.safetensors": kind}),
    st.builds(with_flipped, st.integers(0, HEADER_END - 1), st.integers(1, 255)),
    st.builds(
        with_header, tensors, st.sampled_from(["dtype", "shape", "data_offsets", "more"]),
        st.sampled_from(["I32", "U32", "F8_E8M0", "C64", "F4"]) | values | st.lists(sizes, max_size=3),
    ),
    st.builds(with_tensor, tensors, st.none()),
    st.builds(with_tensor, st.text(st.characters(exclude_categories=["Cs"]), max_size=5), st.just(torch.ones(2))),
    st.builds(with_tensor, tensors, st.lists(st.integers(0, 9), max_size=3).map(torch.ones)),
    st.builds(with_tensor, st.just("norm"), st.integers(0, 3).map(torch.ones)),
    st.builds(lambda name, dtype: with_tensor(name, WEIGHTS[name].to(dtype)), tensors, st.sampled_from(DTYPES)),
    st.builds(with_value, tensors, st.integers(0, 999), st.sampled_from([math.nan, math.inf, -math.inf])),
)  # fmt: skip


def write_folder(folder, files):
    for name, content in files.items():
        if content == "folder":
            (folder / name).mkdir()
        elif content is not None:
            (folder / name).write_bytes(content)


def test_a_damaged_configuration_is_refused_or_still_works():
    search(config_damages, check_damage)


def test_damaged_weights_are_refused_or_still_work():
    search(weights_damages, check_damage)


def check_damage(damage):
    assume(damage.items() - SAVED.items())
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder), SAVED | damage)
        refusal = None
        try:
            check_compressor(folder, SHAPE)
        except ValueError as error:
            refusal = str(error)
        try:
            soft = SoftTokens.load(folder, SHAPE, embed, CPU)
        except ValueError as error:
            words = str(error)
            assert words.startswith(f"metasoft path: {folder!r}") and refusal in (None, words)
            return " ".join(words.split())
        config = json.loads((Path(folder) / "config.json").read_text())
        tensors = load((Path(folder) / "model.safetensors").read_bytes())
    assert refusal is None and config["format"] == CONFIG["format"]
    assert config["model"] | {"name": "tiny"} == config["model"] | CONFIG["model"]
    assert config["sizes"] == soft.sizes == CONFIG["sizes"] | {"top": soft.sizes["top"]}
    assert all(type(size) is int and size >= (name != "scorer") for name, size in config["sizes"].items())
    assert all(tensor.is_floating_point() for tensor in tensors.values())
    assert {name: tensor.shape for name, tensor in tensors.items()} == SHAPES
    assert all(tensor.equal(tensors[name].float()) for name, tensor in soft.state_dict().items())
    ids = torch.arange(20)
    assert soft(embed, ids, ids[:4]).isfinite().all()


def test_a_tensor_that_does_not_belong_there_is_never_read(tmp_path):
    """Half a terabyte of them, in a file with a hole: who reads it does not come back."""
    data = SAVED["model.safetensors"]
    header = json.loads(data[8:HEADER_END])
    end = len(data) - HEADER_END
    header["stray"] = {"dtype": "F32", "shape": [2**37], "data_offsets": [end, end + 2**39]}
    text = json.dumps(header).encode()
    write_folder(tmp_path, SAVED)
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + data[HEADER_END:])
        file.truncate(8 + len(text) + end + 2**39)
    for refuse in (check_compressor, lambda path, shape: SoftTokens.load(path, shape, embed, CPU)):
        with pytest.raises(ValueError, match="model.safetensors cannot be read: has 'stray', which belongs to no comp"):
            refuse(str(tmp_path), SHAPE)


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """A hub cache with two revisions of one compressor, the later one damaged, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--me--mine"
    (repository / "refs").mkdir(parents=True)
    for reference, letter in (("v1", "a"), ("main", "b")):
        commit = letter * 40
        (repository / "refs" / reference).write_text(commit)
        (repository / "snapshots" / commit).mkdir(parents=True)
        write_folder(repository / "snapshots" / commit, SAVED if reference == "v1" else SAVED | {"config.json": b"{"})


@pytest.mark.parametrize("revision", ["v1", "a" * 40])
def test_a_hub_id_may_name_its_revision(hub_cache, revision):
    assert check_compressor(f"me/mine@{revision}", SHAPE) == CONFIG
    with pytest.raises(ValueError, match="'me/mine': config.json is no compressor configuration"):
        check_compressor("me/mine", SHAPE)


@pytest.mark.parametrize("path", ["me/mine@", "me/mine@v9", "me/mine@v1@v1", "@v1"])
def test_a_revision_that_does_not_exist_is_refused(hub_cache, path):
    with pytest.raises(ValueError, match=r"could not be downloaded as a hub id \(name or name@revision\): "):
        check_compressor(path, SHAPE)


@pytest.mark.parametrize("path", ["x" * 300, "/tmp/" + "x" * 5000, "a\0b", __file__, "https://a/b", "a/b/c", "..."])
def test_a_path_that_cannot_be_a_compressor_is_refused(path):
    with pytest.raises(ValueError, match="metasoft path: .* is no directory, not shipped .* could not be downloaded"):
        check_compressor(path, SHAPE)


@pytest.mark.parametrize("text", ["[" * 200_000, '{"format": ' + "9" * 5000 + "}"], ids=["nesting", "digits"])
def test_a_configuration_that_python_cannot_hold_is_refused(tmp_path, text):
    write_folder(tmp_path, SAVED | {"config.json": text.encode()})
    with pytest.raises(ValueError, match="config.json is no compressor configuration"):
        check_compressor(str(tmp_path), SHAPE)
