"""Whichever process serves HTTP has the header middleware, once, and the hooks where requests enter."""

import os
import subprocess
import sys

import pytest
from metasoft_patches.http import app as http

# A worker, after its parent has prepared for two; then the parent of a server with one process.
SCRIPT = """
import os
from metasoft_patches.http import app as http
http.prepare(2), http.prepare(2)
assert os.environ[http.APP_PATH] == http.WORKER_APP
from metasoft_patches.http.worker import app
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.entrypoints import http_server
assert app is http_server.app and any(".generate_request" in path for path in HookRegistry._patched)
http.prepare(1), http.prepare(1)
from metasoft_patches.http.headers import HeaderMiddleware
print(sum(each.cls is HeaderMiddleware for each in app.user_middleware))
"""


# An operator's own application, which replaces what our hook was in.
REPLACING = """
from sglang.srt.entrypoints.http_server import app
from sglang.srt.managers.tokenizer_manager import TokenizerManager

async def generate_request(self, obj, request=None):
    yield {}

TokenizerManager.generate_request = generate_request
"""

names_an_application = pytest.mark.skipif(
    not hasattr(http.envs, http.APP_PATH), reason="this SGLang names no application for its workers"
)


@names_an_application
def test_workers_load_the_plugin_and_the_application_that_was_asked_for():
    env = os.environ | {http.APP_PATH: "sglang.srt.entrypoints.http_server:app"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "1"


# A worker that dies between a health check and its answer is noticed when the time for the answer is over.
SUPERVISOR = f"""
import uvicorn
from uvicorn.supervisors import Multiprocess
if __name__ == "__main__":
    config = uvicorn.Config({http.WORKER_APP!r}, port=0, workers=1, timeout_worker_healthcheck=30)
    Multiprocess(config, sockets=[config.bind_socket()]).run()
"""


@names_an_application
def test_a_worker_whose_hooks_are_lost_ends_the_server_by_name(tmp_path):
    """Under uvicorn's own supervisor, which would start a worker that fails otherwise again for ever."""
    (tmp_path / "replacing.py").write_text(REPLACING)
    (tmp_path / "supervisor.py").write_text(SUPERVISOR)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | {http.INNER_APP_PATH: "replacing:app", "PYTHONPATH": path}
    command = [sys.executable, tmp_path / "supervisor.py"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert "these hooks did not take on SGLang" in done.stderr, done.stderr
    assert "replaced what they were in: sglang.srt.managers.tokenizer_manager.TokenizerManager.generate_request\n" in (
        done.stderr
    )
    assert "stopping the parent process" in done.stderr and "Application startup" not in done.stderr


def test_workers_that_cannot_load_plugins_are_refused(monkeypatch):
    monkeypatch.setattr(http, "envs", object())
    with pytest.raises(ValueError, match="--tokenizer-worker-num 2 is not supported in this SGLang: .*; allowed: 1"):
        http.prepare(2)
