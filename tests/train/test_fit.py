"""``sglang-metasoft fit``: one command from a model to a compressor that servers find."""

import json
import os
from types import SimpleNamespace

import pytest
import torch

from sglang_metasoft.cli import main
from sglang_metasoft.compressor.find import cache_folder, candidates, find_compressors
from sglang_metasoft.hf.shape import read_shape
from sglang_metasoft.train import card, fit
from sglang_metasoft.train.card import Row


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Everything as it is, but less of it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, value in dict(
        LEAST_CASES=2, MOST_CASES=3, LEAST_STEPS=3, MOST_STEPS=4, PACE_STEPS=1, OWN_DOCUMENTS=1,
        OWN_DOCUMENT_TOKENS=8, REPORT_CASES=2, MAX_PREFIX_TOKENS=400,
    ).items():  # fmt: skip
        monkeypatch.setattr(fit, name, value)


@pytest.fixture
def fitted(small, tiny_model, capsys):
    assert main(["fit", str(tiny_model), "--minutes", "5", "--device", "cpu"]) == 0
    return capsys.readouterr().out


def test_one_argument_makes_a_compressor_that_is_found(fitted, tiny_model, backbone):
    shape = read_shape(tiny_model)
    (found,) = [one for one in candidates(shape) if one.origin == "fitted"]
    (same,) = find_compressors(shape, backbone.embed, torch.device("cpu"))
    assert found.path == same.path and found.method == "metasoft"
    assert set(found.report.kept) == set(card.RATIOS) and set(found.report.kept[4]) == {"inside", "after"}
    assert found.path in fitted and "of memory" in fitted.splitlines()[0]
    report = json.loads(open(f"{found.path}/report.json").read())
    names = {cell["ranker"] for cell in report["cells"]}
    assert names == {"fitted", *card.BASELINES} and report["facts"]["steps"] in (3, 4)
    page = open(f"{found.path}/report.html").read()
    assert "What this compressor keeps" in page and "<h2>All prompts</h2>" in page
    assert [name for name in os.listdir(cache_folder()) if name.startswith(".")] == []  # nothing half done is left


def test_an_interrupted_run_goes_on_with_what_it_had_decided(small, tiny_model, monkeypatch, capsys):
    command = ["fit", str(tiny_model), "--minutes", "5", "--device", "cpu"]

    def interrupted(self, accelerator):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(fit._Session, "train", interrupted)
        assert main(command) == 130
    (work,) = [name for name in os.listdir(cache_folder()) if name.startswith(".fit")]
    plan = json.loads((cache_folder() / work / fit.PLAN).read_text())
    assert plan["cases"] == 3
    asked = []
    prepare = fit._Session.prepare
    monkeypatch.setattr(fit._Session, "prepare", lambda self: (asked.append(dict(self.plan)), prepare(self)))
    assert main(command) == 0
    assert asked[0]["cases"] == 3 and asked[0]["documents"] == plan["documents"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--minutes", "0.5"], "--minutes: 0.5 is not allowed; allowed: at least 2"),
        (["--minutes", "nan"], "--minutes: nan"),
        (["--device", "cuda:7"], "--device: 'cuda:7' is not there; allowed: cpu"),
        (["--data", "/no/such/folder"], "training data"),
    ],
)
def test_bad_arguments_get_one_sentence(small, tiny_model, capsys, arguments, words):
    assert main(["fit", str(tiny_model), *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error


def test_too_little_disk_or_memory_is_said_before_any_work(small, tiny_model, monkeypatch, capsys):
    monkeypatch.setattr(fit.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    assert main(["fit", str(tiny_model)]) == 2 and "GiB are free in" in capsys.readouterr().err


def test_too_little_memory(small, tiny_model, monkeypatch, capsys):
    monkeypatch.setattr(fit.psutil, "virtual_memory", lambda: SimpleNamespace(available=10**6))
    assert main(["fit", str(tiny_model)]) == 2 and "of memory on cpu" in capsys.readouterr().err


def test_no_model_there(small, tmp_path, capsys):
    assert main(["fit", str(tmp_path)]) == 2 and "model path" in capsys.readouterr().err


def test_nothing_is_fitted_twice_if_missing_alone_is_asked_for(fitted, tiny_model, capsys):
    assert main(["fit", str(tiny_model), "--device", "cpu", "--if-missing"]) == 0
    assert capsys.readouterr().out.startswith("nothing is fitted, there is a fitted compressor")


def test_what_would_take_too_long_is_refused_by_its_first_prompts_time(small, tiny_model, capsys):
    command = ["fit", str(tiny_model), "--device", "cpu", "--minutes", "5", "--most-minutes"]
    assert main([*command, "0.0001"]) == 2
    error = capsys.readouterr().err
    assert "minutes on cpu at the least; allowed: 0.0001 (--most-minutes)" in error and not candidates_fitted(
        tiny_model
    )
    assert main([*command, "60"]) == 0 and candidates_fitted(tiny_model)


def candidates_fitted(model) -> list:
    return [one for one in candidates(read_shape(model)) if one.origin == "fitted"]


def test_a_cell_adds_up():
    rows = [
        Row("fitted", 4, "inside", "everyday", 500, tokens=10, kept=9, rise=1.0, answers=1, whole=0),
        Row("fitted", 4, "inside", "everyday", 1500, tokens=30, kept=30, rise=0.2, answers=2, whole=2),
    ]
    cells = {cell["group"]: cell for cell in card.summarize(rows)}
    assert cells["all"]["kept"] == pytest.approx(39 / 40) and cells["all"]["rise"] == pytest.approx(0.03)
    assert cells["all"]["whole"] == pytest.approx(2 / 3) and cells["all"]["worst"] == pytest.approx(0.9)
    assert {"task everyday", "from 0 tokens", "from 1024 tokens"} < set(cells)


def test_the_limit_is_the_ratio_up_to_which_both_modes_hold():
    def cells(*lows):
        return [
            {"ranker": "fitted", "ratio": ratio, "mode": mode, "group": "all", "kept": 1.0, "kept_low": low}
            for ratio, low in zip((2, 4, 8), lows, strict=True)
            for mode in ("inside", "after")
        ]

    assert card.limit_ratio(cells(0.99, 0.985, 0.5), "fitted") == 4
    assert card.limit_ratio(cells(0.9, 0.99, 0.99), "fitted") is None


def test_what_keeps_everything_keeps_every_choice(backbone, prepared):
    context = prepared.inside(0, 16)
    rows = card.measure(backbone, [("needles", context)], {"oracle": card.BASELINES["oracle"]}, ratios=(1,))
    assert rows[0].kept == rows[0].tokens > 0 and rows[0].rise == pytest.approx(0, abs=1e-3)
