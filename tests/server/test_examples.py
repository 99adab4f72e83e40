"""The examples, each run as a user would."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import requests

pytestmark = pytest.mark.server

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def server(start_server):
    return start_server("--enable-metasoft")


def run(name: str, *arguments) -> str:
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *arguments], capture_output=True, text=True, timeout=500
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_forks_over_a_document_share_it(server):
    out = run("fork_over_document.py", "--url", server.url)
    computed = [int(number) for number in re.findall(r"(\d+) computed", out)]
    assert len(computed) == 6 and max(computed[1:]) < 120 < computed[0], out


def test_each_request_has_its_ratio(server):
    requests.post(f"{server.url}/flush_cache", timeout=60).raise_for_status()  # no other question over the document
    out = run("per_request_ratio.py", "--url", server.url)
    rows = [[int(cell) for cell in match] for match in re.findall(r"^ *(\d+) +(\d+) +(\d+)  ", out, re.MULTILINE)]
    assert [ratio for ratio, *_ in rows] == [1, 2, 4, 8, 16], out
    assert all(entries == -(-tokens // ratio) for ratio, tokens, entries in rows), out


def test_an_offline_engine_shares_the_document_from_the_third_question_on(model_dir):
    out = run("offline_engine.py", "--model-path", str(model_dir))
    computed = [int(number) for number in re.findall(r"(\d+) computed", out)]
    assert len(computed) == 3 and computed[2] < 120 < computed[0], out


def test_a_compressor_trained_in_miniature_serves(model_dir, tmp_path):
    out = run("train_in_miniature.py", "--model-path", str(model_dir), "--steps", "3", "--cases", "2",
              "--output", str(tmp_path))  # fmt: skip
    prompt, entries = (int(number) for number in re.search(r"(\d+) prompt tokens, (\d+) entries", out).groups())
    assert prompt > 1500 and entries == -(-prompt // 4), out
    assert (tmp_path / "compressor" / "model.safetensors").is_file() and '"overlap metasoft inside 4x"' in out
