"""``--metasoft-fit``: what is refused at once, what runs in a process of its own, and what is left alone."""

import logging

import pytest

from sglang_metasoft.compressor.find import cache_folder
from sglang_metasoft.config import MetaSoftConfig
from sglang_metasoft.hf.shape import read_shape
from sglang_metasoft.train import at_start


@pytest.fixture(autouse=True)
def loud(caplog):
    caplog.set_level(logging.INFO)


@pytest.mark.parametrize(
    ("settings", "nodes", "words"),
    [
        ({"path": "some/folder"}, 1, "metasoft fit: there is a path, 'some/folder'; allowed: one of the two"),
        ({"method": "snapkv"}, 1, "metasoft fit: nothing is fitted for method snapkv; allowed: auto, metasoft"),
        ({}, 2, "metasoft fit: 2 nodes would each need its files; allowed: one node"),
    ],
)
def test_what_could_not_be_served_is_refused(settings, nodes, words):
    with pytest.raises(ValueError, match=words):
        at_start.check(MetaSoftConfig(fit=True, **settings), nodes)
    at_start.check(MetaSoftConfig(**settings), nodes)


def test_where_a_compressor_is_found_nothing_runs(full_model_dir, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(at_start.subprocess, "run", lambda command: pytest.fail("a fit was started"))
    at_start.fit_if_missing(MetaSoftConfig(fit=True), read_shape(full_model_dir), str(full_model_dir))
    assert "nothing is fitted, there is a shipped compressor" in caplog.text


def test_without_the_flag_nothing_runs(tiny_model, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(at_start.subprocess, "run", lambda command: pytest.fail("a fit was started"))
    at_start.fit_if_missing(MetaSoftConfig(), read_shape(tiny_model), str(tiny_model))


def test_a_fit_that_fails_ends_the_start_with_its_reason(tiny_model, monkeypatch, tmp_path, capfd):
    (tmp_path / "sglang-metasoft").write_text("no folder can lie here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"no compressor was made \(exit status 2\), for the reason above; allowed"):
        at_start.fit_if_missing(MetaSoftConfig(fit=True), read_shape(tiny_model), str(tiny_model))
    assert "--work: " in capfd.readouterr().err and not cache_folder().is_dir()
