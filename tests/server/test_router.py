"""SGLang's router in front of two servers: it routes by prefix, so a second turn meets the prefix of the first."""

import contextlib
import subprocess
import sys
import time

import pytest
import requests

from sglang_metasoft.local_server import Server, free_port
from tests.server.checks import SOFT_TOKENS, metasoft

pytestmark = [pytest.mark.server, pytest.mark.slow]

WINDOW = 64


@pytest.fixture(scope="module")
def router(model_dir, tmp_path_factory):
    """Its URL, and the two servers."""
    folder = tmp_path_factory.mktemp("router")
    flags = [*SOFT_TOKENS, "--max-total-tokens", "8192"]
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(Server(model_dir, flags, log=folder / f"server{n}.log")) for n in range(2)]
        port = free_port()
        command = [
            sys.executable, "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", str(port),
            "--prometheus-port", str(free_port()), "--policy", "cache_aware",
            "--worker-urls", *(server.url for server in servers),
        ]  # fmt: skip
        with (folder / "router.log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        stack.callback(process.wait, 30)
        stack.callback(process.terminate)
        url = f"http://127.0.0.1:{port}"
        for _ in range(120):
            with contextlib.suppress(requests.RequestException, KeyError):
                workers = requests.get(f"{url}/workers", timeout=5).json()["workers"]  # it is up before they are known
                if sum(worker["is_healthy"] for worker in workers) == 2:
                    break
            assert process.poll() is None, (folder / "router.log").read_text()
            time.sleep(1)
        yield url, servers


def test_chats_behind_the_router_reuse_their_prefixes(router, document):
    url, servers = router
    for number in range(3):
        text = document[2000 * number :][:3500]
        body = {"text": text, "sampling_params": {"max_new_tokens": 6, "temperature": 0}}
        first = requests.post(f"{url}/generate", json=body, timeout=300).json()
        span = metasoft(first)["span_tokens"]
        assert span == first["meta_info"]["prompt_tokens"] - WINDOW
        body["text"] = text + first["text"] + "\nWhat else?"
        second = requests.post(f"{url}/generate", json=body, timeout=300).json()
        assert metasoft(second)["reused_tokens"] == span
