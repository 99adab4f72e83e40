"""The compressor that ships, served: it finds needles, and the in-process runner gives the same answers, in float32."""

import json
from pathlib import Path

import pytest
import requests

from sglang_metasoft.cli import main
from sglang_metasoft.compressor.files import SHIPPED
from sglang_metasoft.eval.records import read_records
from tests.eval.answers import assert_same_answers, by_key

pytestmark = pytest.mark.server

COMPRESSOR = "smollm2-135m-instruct"
LENGTH, RATIO = "1024", 4
NEEDLES, RIGHT = 6, 5  # at depths from 20 to 70 %
# Six needles with the question in the prompt; of one of them also a repeat, and the question after the document. In
# process that one in all three modes: `make test-all` compares more.
SIX = ["--first", "2", "--cases", str(NEEDLES), "--modes", "inside"]
ONE = ["--first", "5", "--cases", "1", "--modes"]


@pytest.fixture(scope="module")
def model_dir(full_model_dir):
    return full_model_dir


@pytest.fixture(scope="module")
def answers(start_server, model_dir, data_folder, tmp_path_factory):
    """Of the server and of the in-process runner, by task, index, turn, mode and method."""
    server = start_server("--dtype", "float32", "--enable-metasoft", "--enable-metrics")
    assert_found_by_itself(server)
    method = f"metasoft@{COMPRESSOR}"
    found = []
    for command, runs in (
        (["eval", "--url", server.url, "--label", method], (SIX, [*ONE, "repeat", "after"])),
        (["eval-hf", "--model", str(model_dir), "--methods", method], ([*ONE, "inside", "repeat", "after"],)),
    ):
        path = tmp_path_factory.mktemp("eval") / "answers.jsonl"
        for run in runs:
            assert main([*command, "--tasks", "niah_grid", "--lengths", LENGTH, "--ratios", str(RATIO), *run,
                         "--data", str(data_folder), "--output", str(path)]) == 0  # fmt: skip
        found.append(by_key([record for record in read_records(path) if record["ratio"] == RATIO]))  # hf: 1 too
    return found


def assert_found_by_itself(server) -> None:
    """The flag alone serves it, and the server says so: in its log, at ``/server_info``, and as a metric."""
    state = server.info()["internal_states"][0]["metasoft"]["compressor"]
    assert state["kind"] == "shipped" and Path(state["path"]).name == COMPRESSOR
    kept = json.loads((SHIPPED / COMPRESSOR / "config.json").read_text())["report"]["kept"]
    assert state["kept"] == kept
    log = server.log.read_text()
    assert f"shipped compressor {state['path']} for metasoft" in log and "lies above all that the report" in log
    assert 'kind="shipped",method="metasoft"' in requests.get(f"{server.url}/metrics", timeout=60).text


def test_five_of_six_needles_are_found_at_4x(answers):
    served, _ = answers
    inside = [record for record in served.values() if record["mode"] == "inside"]
    assert len(inside) == NEEDLES
    for record in inside:
        assert record["problem"] is None and record["metasoft_kv_tokens"] == -(-record["prompt_tokens"] // RATIO)
    assert sum(record["score"] == 1 for record in inside) >= RIGHT, [record["prediction"] for record in inside]


def test_a_repeat_and_a_question_after_the_document_find_theirs(answers):
    served, _ = answers
    for mode in ("repeat", "after"):
        (record,) = [record for record in served.values() if record["mode"] == mode]
        assert record["problem"] is None and record["score"] == 1, record["prediction"]


def test_the_in_process_runner_gives_the_servers_answers(answers):
    served, in_process = answers
    assert len(in_process) == 3
    assert_same_answers({key: served[key] for key in in_process}, in_process)
