"""Start, ask and stop a real SGLang server; used by the demo, the benchmarks and the tests."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import requests

READY_TIMEOUT_SECONDS = 600
STOP_TIMEOUT_SECONDS = 30


class ServerFailed(RuntimeError):
    """The server did not come up; the message ends with the last lines of its log."""


class Server:
    """An SGLang server in a subprocess; a context manager.

    Args:
        model: model directory.
        flags: further command-line arguments.
        log: file for the server's output.
        port: 0 picks a free one.
        entry: what Python runs; the path of the console script ``sglang`` and ``serve`` are ``sglang serve``.
        env: added to the environment.

    Raises:
        ServerFailed: the process ended, or was not ready in ten minutes.
    """

    def __init__(
        self,
        model: Path,
        flags: list[str] | tuple = (),
        *,
        log: Path,
        port: int = 0,
        entry: tuple[str, ...] = ("-m", "sglang.launch_server"),
        env: dict | None = None,
    ) -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = Path(log)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        flags = ["--model-path", str(model), "--port", str(self.port), *flags]
        self.process = self._start(entry, flags, os.environ | (env or {}))
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def _start(self, entry: tuple[str, ...], flags: list[str], env: dict) -> subprocess.Popen:
        with self.log.open("wb") as sink:
            return subprocess.Popen(
                [sys.executable, *entry, *flags],
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=env,
            )

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise ServerFailed(f"the server ended with code {self.process.returncode}:\n{self.log_tail()}")
            with contextlib.suppress(requests.RequestException):
                if requests.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            time.sleep(0.5)
        raise ServerFailed(f"the server was not ready after {READY_TIMEOUT_SECONDS} s:\n{self.log_tail()}")

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *exception) -> None:
        self.stop()

    def stop(self) -> None:
        """End the server and all its processes."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_TIMEOUT_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def log_tail(self, lines: int = 25) -> str:
        """The last lines of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def generate(self, prompt: str | list[int], max_new_tokens: int = 16, **fields) -> dict:
        """``POST /generate``, greedy unless ``sampling_params`` says otherwise; raises for HTTP errors.

        Args:
            prompt: text or token ids.
            fields: further fields of the request; ``sampling_params`` and ``custom_params`` are merged in.
        """
        sampling = {"temperature": 0, "max_new_tokens": max_new_tokens} | fields.pop("sampling_params", {})
        if "custom_params" in fields:
            sampling["custom_params"] = fields.pop("custom_params")
        prompt_field = {"text": prompt} if isinstance(prompt, str) else {"input_ids": prompt}
        response = requests.post(
            f"{self.url}/generate", json=prompt_field | {"sampling_params": sampling} | fields, timeout=600
        )
        response.raise_for_status()
        return response.json()

    def chat(self, messages: list[dict], max_tokens: int = 64, **fields) -> dict:
        """``POST /v1/chat/completions``, greedy; raises for HTTP errors."""
        body = {"model": "default", "messages": messages, "max_tokens": max_tokens, "temperature": 0} | fields
        response = requests.post(f"{self.url}/v1/chat/completions", json=body, timeout=600)
        response.raise_for_status()
        return response.json()

    def metrics(self, **labels: str) -> dict[str, float]:
        """Prometheus metrics, summed over labels; needs ``--enable-metrics``.

        Args:
            labels: leave out what has another value of these; SGLang counts requests in all (``priority=""``) and
                again by priority.
        """
        values: dict[str, float] = {}
        for line in requests.get(f"{self.url}/metrics", timeout=60).text.splitlines():
            match = re.match(r"([a-zA-Z_:0-9]+)(\{.*\})? (\S+)$", line)
            if match and all(
                f'{name}="' not in (match[2] or "") or f'{name}="{value}"' in match[2] for name, value in labels.items()
            ):
                values[match[1]] = values.get(match[1], 0.0) + float(match[3])
        return values

    def cpu_seconds(self) -> float:
        """CPU seconds that the schedulers took so far: where other work shares the cores, this is what to compare.

        Model, attention and compression run there. A scheduler without requests takes them too.
        """
        family = psutil.Process(self.process.pid).children(recursive=True)
        times = [process.cpu_times() for process in family if "sglang::scheduler" in " ".join(process.cmdline())]
        return sum(taken.user + taken.system for taken in times)

    def info(self) -> dict:
        """``GET /server_info``."""
        return requests.get(f"{self.url}/server_info", timeout=60).json()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
