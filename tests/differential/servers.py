"""Plain SGLang and ours at ratio 1 and 4 side by side: start, send a program's steps, reset, and what must hold."""

import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import requests
from transformers import AutoModelForCausalLM

from sglang_metasoft.local_server import Server
from tests.differential.streams import read_stream
from tests.lora_adapters import write_adapter
from tests.server import forked
from tests.server.checks import SOFT_TOKENS, inside_env, inside_lines

POOL_TOKENS, MIN_TOKENS, WINDOW = 8192, 64, 32
TIMEOUT_SECONDS = 240
COMMON = (
    "--dtype", "float32", "--max-total-tokens", str(POOL_TOKENS), "--max-running-requests", "16", "--random-seed", "1",
    "--served-model-name", "m", "--enable-cache-report", "--tool-call-parser", "qwen25", "--sleep-on-idle",
)  # fmt: skip
OURS = (*SOFT_TOKENS, "--metasoft-min-tokens", str(MIN_TOKENS), "--metasoft-window", str(WINDOW))
ADAPTER = "A"
CHUNKS = ("--chunked-prefill-size", "256", "--enable-mixed-chunk")
PAGES = ("--page-size", "16")
# Name: flags of all three servers, further flags of ours.
VARIANTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "chunks": (CHUNKS, ()),
    "pages": (CHUNKS + PAGES, ()),
    "during-prefill": (CHUNKS + PAGES, ("--metasoft-during-prefill",)),
    "lora": ((*CHUNKS, "--lora-backend", "torch_native", "--max-loras-per-batch", "2", "--lora-paths", ADAPTER), ()),
    # A host pool behind a device pool of half the size.
    "host-pool": (
        (
            *CHUNKS,
            *PAGES,
            "--max-total-tokens",
            str(POOL_TOKENS // 2),
            "--enable-hierarchical-cache",
            "--hicache-ratio",
            "4",
        ),
        ("--metasoft-during-prefill",),
    ),
    "priority": (("--enable-priority-scheduling", "--disable-overlap-schedule"), ("--no-metasoft-keep-raw",)),
}
TWINLESS = {"--metasoft-during-prefill", "--no-metasoft-keep-raw"}
SESSIONS = ("s0", "s1")


class Outcome(NamedTuple):
    """What came back for one step."""

    status: int  # of HTTP; 0: no answer, on purpose or not
    body: object  # parsed JSON, a merged stream or text
    sent: dict  # the request's body, placeholders replaced
    headers: dict = {}  # of the response, those of ours


class Fleet:
    """The three servers; a context manager. One that died is started again before the next program.

    Args:
        model: model directory.
        folder: for the logs.
        variant: of :data:`VARIANTS`.
        ours_only: start no plain server (for draws that would end it).
    """

    NAMES = ("plain", "ratio 1", "ratio 4")

    def __init__(self, model: Path, folder: Path, variant: str) -> None:
        common, ours = VARIANTS[variant]
        self.model, self.folder = model, folder
        self.has_twins = not TWINLESS & set(ours)
        if ADAPTER in common:
            adapter = write_adapter(folder / "adapter", AutoModelForCausalLM.from_pretrained(model), 1, size=0.06)
            common = [f"{ADAPTER}={adapter}" if flag == ADAPTER else flag for flag in common]
        self.flags = {
            "plain": (*COMMON, *common),
            "ratio 1": (*COMMON, *common, *OURS, *ours, "--metasoft-ratio", "1"),
            "ratio 4": (*COMMON, *common, *OURS, *ours, "--metasoft-ratio", "4"),
        }
        self.servers: dict[str, Server] = {}
        self.starts = 0
        self._pool = ThreadPoolExecutor(len(self.NAMES))
        try:
            self.revive()
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> "Fleet":
        return self

    def __exit__(self, *exception) -> None:
        self.stop()

    def stop(self) -> None:
        """End all servers."""
        for server in self.servers.values():
            server.stop()

    def revive(self) -> None:
        """Start those that do not run."""
        dead = [name for name in self.NAMES if not self.is_alive(name)]
        self.starts += len(dead)
        if forked.IS_ON:
            forked.parent()  # one, before several threads ask for it
        for name, server in zip(dead, self._pool.map(self._start, dead), strict=True):
            self.servers[name] = server

    def _start(self, name: str) -> Server:
        log = self.folder / f"{name.replace(' ', '-')}-{self.starts}.log"
        return forked.start(self.model, self.flags[name], log=log, env=inside_env())

    def is_alive(self, name: str) -> bool:
        """Whether the server's process runs; it ends when its scheduler does."""
        return name in self.servers and self.servers[name].process.poll() is None

    def each(self, work) -> dict:
        """``work(name)`` for every server, at the same time."""
        return dict(zip(self.NAMES, self._pool.map(work, self.NAMES), strict=True))

    def reset(self) -> None:
        """Forget what earlier programs left; start again what died or hangs."""
        self.revive()
        self.each(self._reset)

    def _reset(self, name: str) -> None:
        try:
            reset(self.servers[name])
        except (requests.RequestException, TimeoutError):
            self.servers[name].stop()
            self.starts += 1
            self.servers[name] = self._start(name)


def reset(server: Server) -> None:
    """No session, nothing paused, nothing running, nothing cached."""
    post(server, "/continue_generation", {"torch_empty_cache": False})
    post(server, "/abort_request", {"abort_all": True})
    for session in SESSIONS:
        post(server, "/close_session", {"session_id": session})
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while post(server, "/flush_cache", {}).status_code != 200:
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.1)


def post(server: Server, path: str, body: dict, method: str = "POST", **kwargs) -> requests.Response:
    return requests.request(
        method, server.url + path, json=body, timeout=kwargs.pop("timeout", TIMEOUT_SECONDS), **kwargs
    )


def send(server: Server, step: dict, body: dict) -> Outcome:
    """Send one step, its placeholders replaced in ``body``, and wait for its end."""
    kwargs: dict = {"stream": bool(body.get("stream")), "headers": step.get("headers")}
    aborter = None
    if "hang_up" in step:
        kwargs["timeout"] = step["hang_up"]
    if "abort" in step:
        aborter = threading.Timer(step["abort"], post, (server, "/abort_request", {"rid": body.get("rid", "")}))
        aborter.start()
    try:
        if "then" in step:
            post(server, step["path"], body)
            time.sleep(step["after"])
            response = post(server, step["then"], {})
        else:
            response = post(server, step["path"], body, step.get("method", "POST"), **kwargs)
        headers = {
            key.lower(): value for key, value in response.headers.items() if key.lower().startswith("x-metasoft")
        }
        return Outcome(response.status_code, _parsed(response), body, headers)
    except requests.RequestException as error:
        return Outcome(0, f"{type(error).__name__}", body)
    finally:
        if aborter is not None:
            aborter.join()


def _parsed(response: requests.Response):
    if "text/event-stream" in response.headers.get("content-type", ""):
        return read_stream(response)
    try:
        return response.json()
    except ValueError:
        return response.text


def unsoundness(server: Server, has_checks: bool) -> str | None:
    """Ask a trifle, wait until the server idles, and say what is wrong then.

    Args:
        has_checks: of ours: the test-only plugin in ``tests/server/inside`` checks tree, pool, locks and prefixes.
    """
    before = len(inside_lines(server, "ok"))
    try:
        post(server, "/continue_generation", {"torch_empty_cache": False})
        body = {"input_ids": [5, 6, 7], "cache_salt": "check", "sampling_params": {"max_new_tokens": 2}}
        if (response := post(server, "/generate", body)).status_code != 200:
            return f"a trifle is answered with HTTP {response.status_code}: {response.text}"
    except requests.RequestException as error:
        return f"no answer ({type(error).__name__}), exit code {server.process.poll()}:\n{server.log_tail(30)}"
    if not has_checks:
        return None  # SGLang checks its own books, and would have died
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if broken := inside_lines(server, "BROKEN"):
            return broken[0]
        if len(inside_lines(server, "ok")) > before:
            return None
        time.sleep(0.02)
    return f"not idle, or no check, in 60 s:\n{server.log_tail(30)}"


def tracebacks(server: Server) -> list[str]:
    """The last line of each traceback in the log."""
    text = server.log.read_text(errors="replace")
    return re.findall(
        r"Traceback \(most recent call last\):\n(?:.*\n)*?.*?((?:\w+\.)*\w*(?:Error|Exception)\b.*)", text
    )
