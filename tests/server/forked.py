"""Servers forked from one process that has imported SGLang, which takes longer than most tests, three times a server.

With ``OMP_NUM_THREADS=1``, as in ``make test``, and without a GPU. Else, with ``METASOFT_FORK_SERVERS=0``, or with an
environment that SGLang reads on import, a server is started as users start it. Run as a script, this is that process.
"""

import atexit
import contextlib
import functools
import gc
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import torch

from sglang_metasoft.local_server import Server

# libgomp's threads and CUDA's context do not survive a fork.
IS_ON = (
    os.environ.get("METASOFT_FORK_SERVERS") != "0"
    and os.environ.get("OMP_NUM_THREADS") == "1"
    and not torch.cuda.is_available()
)
READ_LATE = {
    "PYTHONPATH", "METASOFT_INSIDE", "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE", "SGLANG_CHECK_KV_PAGE_INVARIANTS",
}  # fmt: skip
IMPORTED = (
    "sglang.launch_server", "sglang.srt.entrypoints.http_server", "sglang.srt.managers.scheduler",
    "sglang.srt.managers.detokenizer_manager", "sglang.srt.models.registry",
)  # fmt: skip


class Forked:
    """A server's process, as far as ``subprocess.Popen`` would be asked.

    Args:
        flags: of ``python -m sglang.launch_server``.
        env: its whole environment.
        log: file for its output.
    """

    def __init__(self, flags: list[str], env: dict[str, str], log: Path) -> None:
        self.returncode: int | None = None
        self.pid = parent().ask(start=[flags, env, str(log)])

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = parent().ask(poll=self.pid)
        return self.returncode

    def wait(self, timeout: float = float("inf")) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("sglang.launch_server", timeout)
            time.sleep(0.1)
        return self.returncode


class Parent:
    """The process that forks them, from this side."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )  # fmt: skip
        atexit.register(self.process.stdin.close)

    def ask(self, **request):
        with self.lock:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            return json.loads(self.process.stdout.readline())


@functools.cache
def parent() -> Parent:
    return Parent()


class ForkedServer(Server):
    """One whose process has SGLang imported already."""

    def _start(self, entry, flags, env):
        return Forked(flags, dict(env), self.log)


def start(model: Path, flags=(), *, env: dict | None = None, **kwargs) -> Server:
    """A running server; arguments as for ``Server``."""
    is_forked = IS_ON and "entry" not in kwargs and set(env or {}) <= READ_LATE
    return (ForkedServer if is_forked else Server)(model, flags, env=env, **kwargs)


def serve(flags: list[str], env: dict[str, str], log: str) -> None:
    """In the child: become what ``python -m sglang.launch_server`` would be. Its own children are forked too."""
    os.setsid()
    sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
    for standard, file in ((0, os.open(os.devnull, os.O_RDONLY)), (1, sink), (2, sink)):
        os.dup2(file, standard)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:] = [*(path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path), *sys.path]
    contexts = multiprocessing.context._concrete_contexts
    contexts["spawn"] = contexts["fork"]
    sys.argv = ["sglang.launch_server", *flags]
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.path.remove(str(Path(__file__).parent))
    for module in IMPORTED:
        __import__(module)
    gc.freeze()  # so that a collection in a child copies no shared page
    started: set[int] = set()
    for line in sys.stdin:
        ((what, value),) = json.loads(line).items()
        if what == "poll":
            pid, status = os.waitpid(value, os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
            started -= {pid}
        elif (answer := os.fork()) == 0:
            code = 1
            try:
                serve(*value)
                code = 0
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else int(error.code is not None)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        if what == "start":
            started.add(answer)
        print(json.dumps(answer), file=answers, flush=True)
    # The tests have ended, perhaps by a signal: what they have not stopped ends too.
    for pid in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    os._exit(0)


if __name__ == "__main__":
    main()
