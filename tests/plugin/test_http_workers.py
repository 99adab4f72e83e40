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


@pytest.mark.skipif(not hasattr(http.envs, http.APP_PATH), reason="this SGLang names no application for its workers")
def test_workers_load_the_plugin_and_the_application_that_was_asked_for():
    env = os.environ | {http.APP_PATH: "sglang.srt.entrypoints.http_server:app"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "1"


def test_workers_that_cannot_load_plugins_are_refused(monkeypatch):
    monkeypatch.setattr(http, "envs", object())
    with pytest.raises(ValueError, match="--tokenizer-worker-num 2 is not supported in this SGLang: .*; allowed: 1"):
        http.prepare(2)
