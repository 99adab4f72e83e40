"""The other ways in: ``sgl.Engine`` and ``sglang serve``; and a start-up that must fail."""

import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import requests
from metasoft_patches.http import app as http

from sglang_metasoft.compressor.soft_tokens import SoftTokens
from sglang_metasoft.hf.shape import read_shape
from sglang_metasoft.local_server import ServerFailed
from tests.server.checks import SOFT_TOKENS
from tests.server.endpoints import Answer, ask
from tests.server.forked import start

pytestmark = pytest.mark.server

WINDOW = 64
names_an_application = pytest.mark.skipif(
    not hasattr(http.envs, http.APP_PATH), reason="this SGLang names no application for its workers"
)
AS_USERS_DO = {"entry": ("-m", "sglang.launch_server")}  # not forked

ENGINE_SCRIPT = """
import sys
import sglang

if __name__ == "__main__":
    engine = sglang.Engine(model_path=sys.argv[1], enable_metasoft=True, metasoft_method="snapkv", metasoft_ratio=8)
    ids = [100 + i % 900 for i in range(1000)]
    for reused in (0, 936):
        out = engine.generate(input_ids=ids, sampling_params={"max_new_tokens": 4, "temperature": 0})
        meta = out["meta_info"]
        assert meta["metasoft_kv_tokens"] == 125 and meta["metasoft_reused_tokens"] == reused, meta
    try:
        engine.generate("Hi", sampling_params={"custom_params": {"metasoft_ratio": -1}})
    except ValueError as error:
        assert "metasoft_ratio=-1 is not allowed" in str(error), error
    else:
        raise AssertionError("a bad value passed")
    engine.shutdown()
    print("engine is fine")
"""


def test_engine(model_dir, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(ENGINE_SCRIPT)
    done = subprocess.run([sys.executable, script, model_dir], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "engine is fine" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("flags", "words", "entry"),
    [
        (["--metasoft-ratio", "0"], "'0' is not allowed; allowed: a number >= 1", {}),
        (["--disable-radix-cache"], "--enable-metasoft cannot run with no radix cache", AS_USERS_DO),
        (["--metasoft-path", "/"], "metasoft path: '/' lacks config.json and model.safetensors", {}),
    ],
    ids=["value", "feature", "compressor"],
)
def test_a_wrong_start_fails_in_one_clear_sentence(model_dir, tmp_path, flags, words, entry):
    with pytest.raises(ServerFailed):
        start(model_dir, ["--enable-metasoft", *flags], log=tmp_path / "log", **entry)
    lines = (tmp_path / "log").read_text().splitlines()
    assert any(words.replace("'0'", "0") in line.replace("'0'", "0") for line in lines), "\n".join(lines[-20:])
    assert "Load weight begin" not in "\n".join(lines)


def test_a_truncated_compressor_fails_before_the_model_loads(model_dir, tmp_path):
    shape = read_shape(model_dir)
    folder = tmp_path / "compressor"
    SoftTokens(shape.hidden_size, 64, 8, shape.num_layers, shape.num_kv_heads).save(folder, shape)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    words = f"metasoft path: '{folder}': model.safetensors cannot be read: "
    test_a_wrong_start_fails_in_one_clear_sentence(model_dir, tmp_path, ["--metasoft-path", str(folder)], words, {})


def test_sglang_serve(start_server, document_ids):
    console_script = Path(sys.executable).with_name("sglang")
    server = start_server("--enable-metasoft", entry=(str(console_script), "serve"))
    meta = server.generate(document_ids[:800], 4)["meta_info"]
    assert meta["metasoft_kv_tokens"] == 200


@pytest.fixture(scope="module")
def two_workers(start_server):
    # Each imports SGLang, on busy cores for longer than the ten seconds in which uvicorn wants to hear of it.
    env = {"SGLANG_UVICORN_WORKER_HEALTHCHECK_TIMEOUT": "300"}
    return start_server(*SOFT_TOKENS, "--tokenizer-worker-num", "2", "--enable-cache-report", env=env)


def connections_to(server, process) -> list:
    made = [each for each in process.net_connections("tcp") if each.status == psutil.CONN_ESTABLISHED]
    return [each for each in made if server.port in (each.laddr.port, each.raddr.port)]


def ask_anyone(server, *args, **kwargs) -> tuple[Answer, int]:
    """Over a connection of its own: the answer, and the process that gave it."""
    before = {connection.laddr for connection in connections_to(server, psutil.Process())}
    with requests.Session() as session:
        answer = ask(server, *args, session=session, **kwargs)
        (ours,) = {connection.laddr for connection in connections_to(server, psutil.Process())} - before
        (pid,) = {
            process.pid
            for process in psutil.Process(server.process.pid).children(recursive=True)
            for connection in connections_to(server, process)
            # An earlier one may still be open on the other worker's side.
            if connection.raddr == ours
        }
    return answer, pid


@contextmanager
def asleep(pid: int):
    """One worker stopped, so that the other takes what comes."""
    worker = psutil.Process(pid)
    worker.suspend()
    try:
        yield
    finally:
        worker.resume()


@names_an_application
def test_settings_and_outcome_pass_through_whichever_http_worker(two_workers, document):
    """A prompt through each worker, and again through the other one."""
    headers = {"x-metasoft-ratio": "8"}
    _, answered = ask_anyone(two_workers, "/generate", "Hello", stream=False)
    pids = {answered}
    for number in range(4):
        text = f"{number} " + document[300 * number :][:4000]
        with asleep(answered):
            first, pid = ask_anyone(two_workers, "/generate", text, stream=False, headers=headers)
        with asleep(pid):
            again, answered = ask_anyone(two_workers, "/generate", text, stream=True, headers=headers)
        assert answered != pid
        pids |= {pid, answered}
        if number % 2:  # the next prompt begins with the other worker
            answered = pid
        length = first.prompt_tokens
        assert first.headers == {"span-tokens": length - WINDOW, "kv-tokens": -(-length // 8), "reused-tokens": 0}
        assert first.meta["metasoft_kv_tokens"] == first.headers["kv-tokens"]
        assert again.headers == first.headers | {"reused-tokens": length - WINDOW}
    assert len(pids) == 2


@names_an_application
def test_a_bad_header_is_http_400_from_whichever_http_worker(two_workers):
    headers = {"x-metasoft-ratio": "0.5"}
    words = "header x-metasoft-ratio: '0.5' is not allowed; allowed: a number >= 1"
    answer, pid = ask_anyone(two_workers, "/v1/chat/completions", "Hello", stream=False, headers=headers)
    with asleep(pid):
        other, other_pid = ask_anyone(two_workers, "/v1/chat/completions", "Hello", stream=False, headers=headers)
    assert pid != other_pid
    for refused in (answer, other):
        assert refused.status == 400 and words in refused.body["message"]
