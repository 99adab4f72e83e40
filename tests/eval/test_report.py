"""Reports from canned results."""

import json

import pytest

from sglang_metasoft.eval import report
from sglang_metasoft.eval.case import Case, Turn
from sglang_metasoft.eval.records import FULL, Store, make_record
from sglang_metasoft.eval.statistics import estimate, retention, score


def case(task, family, index, **fields):
    return Case(task, family, index, 1, 2048, "text", (Turn("?", ("yes",)),), "string_match_all", 8, **fields)


@pytest.fixture
def results(tmp_path):
    """Full cache: needle 10/10, vt 5/10, cwe 1/10 (which it cannot do). Method at 4: 8, 2, 1; at 8: 4, 0, 0."""
    store = Store(tmp_path / "results.jsonl")
    right = {("niah_single_1", "needle"): (10, 8, 4), ("vt", "tracing"): (5, 2, 0), ("cwe", "counting"): (1, 1, 0)}
    for (task, family), counts in right.items():
        for (method, ratio), count in zip([(FULL, 1), ("snapkv", 4), ("snapkv", 8)], counts, strict=True):
            for index in range(10):
                answer = "yes" if index < count else "no"
                store.add(make_record(case(task, family, index), 0, "inside", method, ratio, prediction=answer))
    store.add(make_record(case("vt", "tracing", 10), 0, "inside", "snapkv", 4, prediction="yes", problem="too_short"))
    for index in range(11):
        grid = case("niah_grid", "needle", index, details={"depth": 10 * index})
        store.add(make_record(grid, 0, "inside", "snapkv", 4, prediction="yes"))
    return store


def test_retention_counts_only_tasks_that_the_full_cache_can_do(results):
    cells = report.summarise(results.records)["cells"]
    kept = {(cell["group"], cell["ratio"]): cell["retention"] for cell in cells}
    assert kept["all", 4] == pytest.approx((0.8 + 0.2) / (1.0 + 0.5))
    assert kept["seen", 4] == pytest.approx(0.8) and kept["unseen", 4] == pytest.approx(0.4)
    assert kept["all", 8] == pytest.approx(0.4 / 1.5)
    (cell,) = [cell for cell in cells if (cell["group"], cell["ratio"]) == ("all", 4)]
    assert cell["tasks"] == ["niah_single_1", "vt"] and cell["cases"] == 20
    low, high = cell["retention_interval"]
    assert low < cell["retention"] < high < 1


def test_an_interval_is_paired_with_the_full_cache():
    import numpy as np

    scores = np.array([[1.0, 1.0]] * 5 + [[0.0, 0.0]] * 5)
    # Equal case by case, however they are drawn.
    assert estimate({"vt": scores}, retention) == (1.0, (1.0, 1.0))
    value, (low, high) = estimate({"vt": scores}, score)
    assert value == 0.5 and 0.1 < low < 0.4 < 0.6 < high < 0.9


def test_answers_with_a_problem_are_shown_and_not_scored(results):
    summary = report.summarise(results.records)
    assert summary["problems"] == [{"method": "snapkv", "mode": "inside", "problem": "too_short", "answers": 1}]
    (row,) = [row for row in summary["tasks"] if (row["task"], row["ratio"]) == ("vt", 4)]
    assert row["cases"] == 10
    assert "| snapkv | inside | too_short | 1 |" in report.markdown(summary)


def test_the_command_writes_json_table_and_plots(results, tmp_path):
    from sglang_metasoft.cli import main

    assert main(["eval-report", str(results.path), "--output", str(tmp_path / "out")]) == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    plots = [f"quality-2048-inside-{group}.png" for group in ("all", "seen", "unseen")]
    assert names == ["needle-snapkv-4-inside.png", *plots, "report.json", "report.md"]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["cells"]
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| snapkv | 4 | 66.7 (" in text and "| full | 1 | 10.0 | 100.0 | 50.0 |" in text


def test_others_are_compared_with_a_reference_case_by_case(results, tmp_path):
    for index in range(10):
        record = make_record(
            case("vt", "tracing", index), 0, "inside", "h2o", 4, prediction="yes" if index < 5 else "no"
        )
        results.add(record)
    (row,) = report.summarise(results.records, "h2o")["comparisons"]
    assert (row["method"], row["ratio"]) == ("snapkv", 4) and row["advantage"] == pytest.approx(0.3)
    assert row["interval"][0] <= 0.3 <= row["interval"][1]
    with pytest.raises(ValueError, match="--reference: 'h3o' has no records; allowed: full, h2o, snapkv"):
        report.write(results.records, tmp_path, "h3o")


def test_missing_results_are_refused(tmp_path, capsys):
    from sglang_metasoft.cli import main

    assert main(["eval-report", str(tmp_path / "none.jsonl"), "--output", str(tmp_path)]) == 2
    assert "none.jsonl does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--url", "http://127.0.0.1:9"], "--url: http://127.0.0.1:9 cannot be reached"),
        (["--tasks", "ruller"], "task 'ruller' is unknown; allowed: the groups ruler"),
        (["--concurrency", "0"], "--concurrency: 0 is not allowed; allowed: 1 or more"),
    ],
)
def test_bad_arguments_end_before_any_work(arguments, message, tmp_path, capsys):
    from sglang_metasoft.cli import main

    assert main(["eval", *arguments, "--output", str(tmp_path / "results.jsonl")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "results.jsonl").exists()
