"""A tiny evaluation of a real server, one case for each family, and the in-process runner beside it, in float32."""

import json

import pytest
import requests

from sglang_metasoft.cli import main
from sglang_metasoft.eval.client import find_problem
from sglang_metasoft.eval.records import read_records
from tests.eval.answers import assert_same_answers, by_key

pytestmark = [pytest.mark.server, pytest.mark.slow]

TASKS = [
    "niah_single_1", "vt", "fwe", "qa_1", "lb_summary", "lb_few_shot", "lb_retrieval", "lb_code", "sc_kv",
    "book_perplexity",
]  # fmt: skip
LENGTH, RATIOS, MODES = "900", ["1", "4"], ["inside", "repeat", "after"]


@pytest.fixture(scope="module")
def model_dir(full_model_dir):
    """All layers: a truncated model babbles, and near ties decide what it says."""
    return full_model_dir


@pytest.fixture(scope="module")
def arguments(data_folder):
    return ["--tasks", *TASKS, "--lengths", LENGTH, "--ratios", *RATIOS, "--modes", *MODES, "--cases", "1",
            "--data", str(data_folder)]  # fmt: skip


@pytest.fixture(scope="module")
def server(start_server):
    return start_server("--dtype", "float32", "--enable-metasoft", "--metasoft-method", "snapkv")


@pytest.fixture(scope="module")
def served(server, arguments, tmp_path_factory):
    path = tmp_path_factory.mktemp("eval") / "server.jsonl"
    assert main(["eval", "--url", server.url, "--label", "snapkv", *arguments, "--output", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def in_process(model_dir, arguments, tmp_path_factory):
    path = tmp_path_factory.mktemp("eval") / "hf.jsonl"
    command = ["eval-hf", "--model", str(model_dir), "--methods", "snapkv", *arguments, "--output", str(path)]
    assert main(command) == 0
    return path


def evaluate(server, task, data_folder, path, *more) -> list[str]:
    """A command that asks one case of one task."""
    return [
        "eval", "--url", server.url, "--label", "snapkv", "--tasks", task, "--lengths", LENGTH, "--ratios", *RATIOS,
        "--cases", "1", "--data", str(data_folder), "--output", str(path), *more,
    ]  # fmt: skip


def test_every_answer_is_of_a_compressed_prompt(served):
    records = by_key(read_records(served))
    assert len(records) == 9 * 3 * 2 + 3 * 2 + 2  # further turns of sc_kv, and the book: only after the document
    assert [key for key, record in records.items() if record["problem"]] == []
    for (task, _, _, mode, method), record in records.items():
        if method == "snapkv":
            span, prompt = record["metasoft_span_tokens"], record["prompt_tokens"]
            assert span >= 512 and record["metasoft_kv_tokens"] < prompt / 4 + (prompt - span) + 1, (task, mode)
            assert record["metasoft_reused_tokens"] == (0 if mode == "inside" else span), (task, mode)
        else:
            assert record["metasoft_bypass"] == "opted_out"


def test_the_in_process_runner_gives_the_servers_answers(served, in_process):
    assert_same_answers(by_key(read_records(served)), by_key(read_records(in_process)))


def test_a_second_run_asks_nothing(server, served, arguments, capsys):
    before = served.read_text()
    requests.post(f"{server.url}/flush_cache", timeout=60)
    assert main(["eval", "--url", server.url, "--label", "snapkv", *arguments, "--output", str(served)]) == 0
    assert served.read_text() == before


def test_chat_api_gives_the_answer_of_token_ids(server, served, data_folder, tmp_path):
    path = tmp_path / "chat.jsonl"
    command = evaluate(server, "niah_single_1", data_folder, path, "--api", "chat", "--modes", "inside", "after")
    assert main(command) == 0
    expected = by_key(read_records(served))
    for key, record in by_key(read_records(path)).items():
        assert record["problem"] is None
        if record["mode"] == "inside":  # elsewhere the server may cut the document's last tokens in another way
            assert record["prediction"].strip() == expected[key]["prediction"].strip()


def test_completions_do_not_report_compression_and_are_not_scored(server, data_folder, tmp_path):
    path = tmp_path / "completions.jsonl"
    assert main(evaluate(server, "vt", data_folder, path, "--api", "completions")) == 0
    scores = {record["ratio"]: (record["score"], record["problem"]) for record in map(json.loads, path.open())}
    assert scores[4.0] == (None, "not_reported") and scores[1.0][0] is not None


def test_reports_that_do_not_fit_a_mode_are_problems():
    good = {"metasoft_span_tokens": 800, "metasoft_kv_tokens": 225, "metasoft_reused_tokens": 800}
    assert find_problem(good, "repeat", None, 1) is None and find_problem(good, "after", 800, 1) is None
    assert find_problem(good, "after", 810, 1) == "not_reused" and find_problem(good, "after", 815, 16) is None
    assert find_problem(good, "inside", None, 1) == "reused"
    assert find_problem(good | {"metasoft_bypass": "too_short"}, "repeat", None, 1) == "too_short"
