"""Which compressor is found for a model: by its shape and embedding rows, in a cache that nobody else could write."""

import json
import logging
import os
from pathlib import Path

import pytest
import torch

from sglang_metasoft.compressor.find import cache_folder, candidates, find_compressors, fingerprint
from sglang_metasoft.compressor.soft_tokens import SoftTokens
from sglang_metasoft.config import MetaSoftConfig
from sglang_metasoft.demo.model import COMPRESSOR
from sglang_metasoft.hf.rows import embed_from_files
from sglang_metasoft.hf.shape import read_shape
from sglang_metasoft.methods import auto
from sglang_metasoft.types import ModelShape

SHAPE = ModelShape("tiny", vocab_size=64, hidden_size=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4)
CPU = torch.device("cpu")
TABLE, OTHER_TABLE = (torch.randn(64, 8, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4))


def embed(ids):
    return TABLE[ids]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache_folder().mkdir(parents=True, mode=0o700)
    return cache_folder()


def fit(cache: Path, name: str, table: torch.Tensor = TABLE, shape: ModelShape = SHAPE, age: int = 0, **report) -> Path:
    """A compressor in the cache, as ``fit`` leaves one."""
    folder = cache / name
    folder.mkdir()
    SoftTokens.untrained(shape, 2, lambda ids: table[ids], CPU).save(folder, shape)
    if report:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"report": report}))
    times = (os.stat(folder / "model.safetensors").st_mtime - age,) * 2
    os.utime(folder / "model.safetensors", times)
    return folder


def found() -> list[str]:
    return [Path(compressor.path).name for compressor in find_compressors(SHAPE, embed, CPU)]


def test_the_newest_fitted_one_comes_first(cache):
    for name, age in (("b", 20), ("a", 10), ("c", 30)):
        fit(cache, name, age=age)
    assert found() == ["a", "b", "c"]


def test_another_models_is_passed_over_without_a_word(cache, caplog):
    fit(cache, "other-rows", OTHER_TABLE)
    fit(cache, "other-shape", shape=SHAPE._replace(num_heads=4))
    fit(cache, "own", age=10)
    assert [Path(one.path).name for one in candidates(SHAPE)] == ["other-rows", "own"] and found() == ["own"]
    assert not caplog.records


def test_a_broken_one_and_a_draft_are_passed_over(cache, caplog):
    (fit(cache, "broken") / "config.json").write_text("{")
    weights = fit(cache, "cut") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    fit(cache, ".draft")
    fit(cache, "own", age=10)
    assert found() == ["own"]
    words = " ".join(record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert "broken" in words and "cut" in words and ".draft" not in words


@pytest.mark.parametrize("part", ["..", ".", "own", "own/config.json", "own/model.safetensors"])
def test_what_every_user_may_write_is_passed_over_with_a_warning(cache, caplog, part):
    fit(cache, "own")
    path = cache / part
    path.chmod(path.stat().st_mode | 0o002)
    assert found() == [] and "allowed: chmod o-w" in caplog.text


def test_what_belongs_to_another_user_is_passed_over_with_a_warning(cache, caplog, monkeypatch):
    fit(cache, "own")
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    if cache.stat().st_uid == 0:
        assert found() == ["own"]  # root could change anything anyway
        os.chown(cache / "own", 4243, -1)
    assert found() == [] and "allowed: this user, 4242, or root" in caplog.text


def test_a_cache_that_cannot_be_read_is_passed_over_with_a_warning(cache, caplog, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    fit(cache, "own")
    monkeypatch.setattr(Path, "iterdir", refuse)
    monkeypatch.setattr("sglang_metasoft.compressor.files.SHIPPED", Path("/nowhere"))
    assert found() == [] and "the cache of compressors cannot be read" in caplog.text


def test_no_cache_is_no_fault(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "none"))
    assert found() == [] and not caplog.records


def test_a_relative_cache_home_is_ignored(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "somewhere")
    assert cache_folder() == Path.home() / ".cache" / "sglang-metasoft" / "compressors"


def test_the_demo_model_gets_the_shipped_one_by_its_rows_and_a_fitted_one_beats_it(cache, full_model_dir):
    shape = read_shape(full_model_dir)._replace(name="any/other-name")
    rows = embed_from_files(str(full_model_dir), shape)
    (shipped,) = find_compressors(shape, rows, CPU)
    assert shipped.origin == "shipped" and Path(shipped.path).name == COMPRESSOR
    assert find_compressors(shape, lambda ids: rows(ids).flip(-1), CPU) == []
    (cache / "own").mkdir()
    for name in ("config.json", "model.safetensors"):
        (cache / "own" / name).write_bytes((Path(shipped.path) / name).read_bytes())
    assert [one.origin for one in find_compressors(shape, rows, CPU)] == ["fitted", "shipped"]
    assert auto.find(MetaSoftConfig(), shape, rows, CPU).origin == "fitted"
    assert auto.find(MetaSoftConfig(path=COMPRESSOR), shape, rows, CPU).origin == "given"
    assert auto.find(MetaSoftConfig(method="snapkv"), shape, rows, CPU) is None


def test_a_ratio_above_the_reports_limit_is_said(cache):
    fit(cache, "own", kept={"4": {"inside": 0.93}}, limit_ratio=6.0)
    (own,) = find_compressors(SHAPE, embed, CPU)
    assert "kept when fitted: 93% inside at 4x; limit ratio 6" in own.description
    assert "ratio 8 lies above 6" in auto.beyond_report(MetaSoftConfig(ratio=8.0), own)
    assert auto.beyond_report(MetaSoftConfig(ratio=6.0), own) is None


def test_a_report_that_vouches_for_no_ratio_is_said_at_any(cache):
    fit(cache, "own", kept={"4": {"inside": 0.93}})
    (own,) = find_compressors(SHAPE, embed, CPU)
    assert "ratio 2 lies above all that the report" in auto.beyond_report(MetaSoftConfig(ratio=2.0), own)
    assert auto.beyond_report(MetaSoftConfig(ratio=1.0), own) is None


def test_equal_files_have_one_fingerprint_wherever_they_lie(cache):
    first, second = (fit(cache, name) for name in ("a", "b"))
    (second / "model.safetensors").write_bytes((first / "model.safetensors").read_bytes())
    assert len({fingerprint(one) for one in find_compressors(SHAPE, embed, CPU)}) == 1
    fit(cache, "c", OTHER_TABLE)
    assert len({fingerprint(one) for one in candidates(SHAPE)}) == 2


@pytest.mark.parametrize(
    ("settings", "fits", "kind", "served", "warned"),
    [
        ({}, True, "fitted", "metasoft", False),
        ({}, False, "training_free", "snapkv_keydiff", True),
        ({"method": "metasoft"}, False, "untrained", "metasoft", True),
        ({"method": "metasoft"}, True, "fitted", "metasoft", False),
        ({"method": "random"}, True, "chosen", "random", False),
        ({"path": "own"}, True, "given", "metasoft", False),
    ],
)
def test_what_is_served_has_a_kind(cache, settings, fits, kind, served, warned):
    folder = fit(cache, "own", TABLE if fits else OTHER_TABLE)
    if "path" in settings:
        settings = {"path": str(folder)}
    config = MetaSoftConfig(consolidation="none", **settings)
    found = auto.serve(config, SHAPE, embed, CPU, model=None)
    assert (found.kind, found.method.config.method) == (kind, served)
    assert (found.compressor is not None) == (kind in ("fitted", "given"))
    assert any("NO COMPRESSOR was found" in words and "--metasoft-fit" in words for words in found.warnings) == warned
