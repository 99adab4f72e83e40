"""Files that the project writes: whose they are, and that one never takes another's place."""

import os
import stat

import pytest
from metasoft_patches.forward.runner import RID_CHARS, file_stem

from sglang_metasoft.inspect import command


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
