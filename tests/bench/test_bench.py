"""``sglang-metasoft bench``: its arguments, its report, and a small real run."""

import json
import re

import pytest

from sglang_metasoft.bench import result_file, tables
from sglang_metasoft.bench.command import main
from sglang_metasoft.bench.run import check, run_all
from sglang_metasoft.bench.workloads import WORKLOADS, Size

SIZE = Size(prompt_tokens=600, output_tokens=4, requests=4)


@pytest.mark.parametrize(
    ("size", "pools", "workloads", "words"),
    [
        (SIZE, ["huge"], ["one-by-one"], "pool 'huge' is not allowed; allowed: tight, ample"),
        (SIZE, ["tight"], ["chat"], "workload 'chat' is not allowed; allowed: long-documents"),
        (Size(10, 4, 4), ["tight"], ["one-by-one"], "prompt_tokens 10 is not allowed; allowed: an integer >= 64"),
        (Size(600, 1, 4), ["tight"], ["one-by-one"], "output_tokens 1 is not allowed; allowed: an integer >= 2"),
    ],
)
def test_bad_arguments_are_named(size, pools, workloads, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        check(size, pools, workloads)


def test_a_pool_is_as_tight_as_it_says():
    assert SIZE.pool_tokens("tight") // (600 + 4) == 4
    assert SIZE._replace(requests=64).pool_tokens("tight") // (600 + 4) == 16
    assert SIZE.pool_tokens("ample") >= 2 * 4 * (600 + 4)


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_client_knows_every_argument_of_a_workload(name):
    """``sglang.benchmark.serving`` reads its arguments in its main block; its source has them."""
    import importlib.util
    from pathlib import Path

    folder = importlib.util.find_spec("sglang").submodule_search_locations[0]
    source = (Path(folder) / "benchmark" / "serving.py").read_text()
    for word in WORKLOADS[name](SIZE):
        assert not word.startswith("--") or f'"{word}"' in source, word


def record(system: str, **figures) -> dict:
    base = dict.fromkeys(
        ("ttft_median_ms", "itl_median_ms", "itl_p99_ms", "prompt_tokens", "cached_tokens", "retractions"), 0
    )
    base |= {"pool": "tight", "workload": "long-documents", "system": system, "series": [(0.2, 1, 9), (0.4, 4, 9)]}
    return base | figures


def test_the_table_compares_what_belongs_together(tmp_path):
    result = {
        "machine": {"accelerator": "none", "cpu": "x", "sglang": "0", "torch": "2", "date": "2026-11-24"},
        "model": "m",
        "size": SIZE._asdict(),
        "results": [
            record("plain", peak_running=4, output_tokens_per_second=10.0),
            record("plain", peak_running=4, output_tokens_per_second=10.0, workload="one-by-one"),
            record("metasoft", peak_running=15, output_tokens_per_second=0.0),
        ],
    }
    text = tables.table(result)
    assert "4 → 15 (**3.75×**)" in text and "10.0 → 0.0 (**0.00×**)" in text
    assert "one-by-one" not in text  # its twin was not measured
    tables.plot(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_rounds_are_told_as_medians_with_their_spread():
    speeds = [("plain", 10.0, 0), ("metasoft", 9.0, 0), ("metasoft", 11.0, 1), ("plain", 20.0, 1), ("plain", 30.0, 2)]
    speeds.append(("metasoft", 33.0, 2))
    result = {
        "machine": {"accelerator": "none", "cpu": "x", "sglang": "0", "torch": "2", "date": "2026-11-24"},
        "model": "m",
        "size": SIZE._asdict(),
        "results": [
            record(system, peak_running=4, output_tokens_per_second=speed, round=turn) for system, speed, turn in speeds
        ],
    }
    assert "20.0 → 11.0 (**0.55×**, 0.55 to 1.10)" in tables.table(result)


def test_no_round_is_refused():
    with pytest.raises(ValueError, match="rounds 0 is not allowed; allowed: an integer >= 1"):
        check(SIZE, ["tight"], ["one-by-one"], rounds=0)


def test_a_wrong_workload_ends_the_command_before_anything_starts(tmp_path):
    with pytest.raises(ValueError, match="workload 'x'"):
        main(["--model-path", "nowhere", "--workload", "x", "--output", str(tmp_path)])


@pytest.mark.server
def test_a_small_run_measures_both_servers(model_dir, tmp_path):
    names = ["long-documents", "shared-document", "multi-turn", "short-prompts"]
    flags = ["--metasoft-during-prefill", "--metasoft-min-tokens", "128"]
    result = run_all(model_dir, SIZE, ["tight"], names, flags, ["--chunked-prefill-size", "256"])
    json.dumps(result)
    by_name = {plain["workload"]: (plain, metasoft) for plain, metasoft in tables.pairs(result)}
    assert list(by_name) == names
    for plain, metasoft in by_name.values():
        assert plain["completed"] == metasoft["completed"] > 0
        assert plain["saved_slots"] == 0
    plain, metasoft = by_name["long-documents"]
    assert metasoft["saved_slots"] >= 4 * (600 - 64) * 0.6
    assert by_name["short-prompts"][1]["saved_slots"] == 0
    assert by_name["shared-document"][1]["reused_tokens"] > 0


def test_a_kept_result_says_how_it_was_made(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["benchmarks/memory.py", "--new-tokens", "160"])
    result_file.write(tmp_path / "new" / "memory.json", {"plain": 4})
    kept = json.loads((tmp_path / "new" / "memory.json").read_text())
    assert kept["command"] == "python benchmarks/memory.py --new-tokens 160" and kept["result"] == {"plain": 4}
    assert {"cpu", "accelerator", "sglang", "torch", "date"} <= set(kept["machine"])
