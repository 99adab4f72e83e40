"""Files that the project writes: whose they are, and that one never takes another's place."""

import os
import stat
from types import SimpleNamespace

import pytest
import torch
from metasoft_patches.forward.runner import RID_CHARS, ProbeRunner, file_stem
from safetensors.torch import load_file, save_file

from sglang_metasoft.config import MetaSoftConfig
from sglang_metasoft.inspect import command
from sglang_metasoft.train.prepare import write_atomically
from sglang_metasoft.types import Plan


@pytest.mark.parametrize("mask", [0o077, 0o022, 0o027])
def test_a_page_obeys_the_umask(tmp_path, monkeypatch, mask):
    monkeypatch.setattr(command, "_make_page", lambda *args: b"<html>")
    page = tmp_path / "page.html"
    before = os.umask(mask)
    try:
        assert command.main(["--output", str(page)]) == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE(page.stat().st_mode) == 0o666 & ~mask
    assert list(tmp_path.iterdir()) == [page] and page.read_bytes() == b"<html>"


@pytest.mark.parametrize("mask", [0o077, 0o022])
def test_a_compressors_weights_obey_the_umask(tmp_path, mask):
    path = tmp_path / "model.safetensors"
    before = os.umask(mask)
    try:
        write_atomically(path, lambda draft: save_file({"x": torch.zeros(2)}, draft))
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
    assert list(tmp_path.iterdir()) == [path] and load_file(path)["x"].shape == (2,)


def test_traces_of_two_requests_never_share_a_name(tmp_path):
    rids = [
        "a",
        "a/b",
        "a_b",
        "a:b",
        "a\nb",
        "A",
        "../a",
        "",
        ".",
        "a\0",
        "\ud800",
        "é",
        "r" * 300,
        "r" * 301,
        "r" * 5000,
    ]
    stems = [file_stem(rid) for rid in rids]
    assert len(set(stems)) == len(rids) and stems[0] == "a"
    for stem in stems:
        assert len(stem) <= RID_CHARS + 17
        path = tmp_path / f"{stem}-{10**9}-rank1000.safetensors"
        path.touch()
        assert path.parent == tmp_path
    assert file_stem("a_b.0123456789abcdef") not in stems


def test_traces_of_requests_with_the_same_id_are_all_kept(tmp_path):
    """A client may use one id again; so may a replica that writes into the same folder."""
    replicas = [ProbeRunner.__new__(ProbeRunner) for _ in range(2)]
    for replica in replicas:
        replica.config, replica.rank = MetaSoftConfig(trace_dir=str(tmp_path / "traces")), 0
    plan = Plan(start_slots=0, span_tokens=600, kept_slots=4, sink_tokens=1)
    for number in range(5):
        layers = [[torch.full((2, 4), number)] * 3] * 6
        replicas[number % 2]._write_trace(SimpleNamespace(rid="chat"), plan, layers)
    paths = sorted((tmp_path / "traces").glob("chat-0-rank0*.safetensors"))
    assert sorted(int(load_file(path)["kept"].max()) for path in paths) == [0, 1, 2, 3, 4]
    assert paths == sorted((tmp_path / "traces").iterdir())
