"""What several server tests check: the report of a response, and that the pool is whole again."""

import contextlib
import json
import os
import threading
import time
from importlib.metadata import version
from pathlib import Path

import requests

# Untrained soft tokens, for tests of the probe: without a compressor a server takes a method that has none.
SOFT_TOKENS = ("--enable-metasoft", "--metasoft-method", "metasoft")

# SGLang checks its own books after every batch and whenever idle, and dies if they do not add up.
STRICT_CHECKS = {
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1",
}

# The field of ``/generate`` that keeps tenants apart, beside ``extra_key``; 0.5.17 has that one alone.
SALT = "extra_key" if version("sglang") == "0.5.17" else "cache_salt"

INSIDE = Path(__file__).with_name("inside")


@contextlib.contextmanager
def aborting(server, rid: str, after_seconds: float):
    """Within it a request is aborted, from then on, again and again: an abort that comes before its request is lost."""
    answered = threading.Event()

    def keep_aborting() -> None:
        answered.wait(after_seconds)
        while not answered.is_set():
            requests.post(f"{server.url}/abort_request", json={"rid": rid}, timeout=60)
            answered.wait(0.2)

    thread = threading.Thread(target=keep_aborting)
    thread.start()
    try:
        yield
    finally:
        answered.set()
        thread.join()


def inside_env(**faults) -> dict[str, str]:
    """Environment of a server that runs the plugin in ``inside``: its checks and, if asked for, its faults."""
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(INSIDE)]))
    # 0.5.17's check after every batch does not count a half prefilled prompt that waits for room: a false alarm.
    lenient = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "0"} if version("sglang") == "0.5.17" else {}
    return STRICT_CHECKS | lenient | {"PYTHONPATH": path, "METASOFT_INSIDE": json.dumps(faults)}


forgiven: dict[str, int] = {}  # by server: lines with BROKEN that a test caused on purpose


def forgive(server) -> None:
    """What is broken until now was meant to be."""
    forgiven[server.url] = len(inside_lines(server, "BROKEN"))


def inside_lines(server, word: str) -> list[str]:
    """What the plugin wrote: lines with ``ok``, ``BROKEN`` or ``fault``."""
    return [line for line in server.log.read_text(errors="replace").splitlines() if f"metasoft inside: {word}" in line]


def assert_sound_inside(server, checks_before: int) -> None:
    """The plugin checks once more, as it does after each change when the server idles, and finds nothing wrong."""

    def broken() -> list[str]:
        return inside_lines(server, "BROKEN")[forgiven.get(server.url, 0) :]

    deadline = time.monotonic() + 60
    while len(inside_lines(server, "ok")) <= checks_before and time.monotonic() < deadline:
        if broken():
            break
        time.sleep(0.1)
    assert not broken(), "\n".join(broken())
    assert len(inside_lines(server, "ok")) > checks_before, f"no check came out well in 60 s:\n{server.log_tail(40)}"


def assert_sound_after_all(server) -> None:
    """After everything sent so far: one more request changes the state, and the check that follows finds nothing wrong.

    Checks that came before prove nothing, and may be all there are: the plugin checks once after each change.
    """
    checks = len(inside_lines(server, "ok"))
    server.generate([1, 2, 3], 1)
    assert_sound_inside(server, checks)


def wait_until(server, is_reached, what: str) -> dict[str, float]:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        metrics = server.metrics(priority="")
        if is_reached(metrics):
            return metrics
        time.sleep(0.5)
    raise AssertionError(f"{what} not reached in 120 s: {metrics}")


def wait_until_idle(server) -> dict[str, float]:
    return wait_until(
        server, lambda m: m["sglang:num_running_reqs"] == 0 and m["sglang:num_queue_reqs"] == 0, "idleness"
    )


def assert_pool_is_whole(server, pool_tokens: int, expects_faults: bool = False) -> None:
    """Free and tree-held slots are the whole pool, and SGLang's own checks, set to raise, had nothing to say.

    Args:
        expects_faults: the log holds the tracebacks of compressions that failed on purpose.
    """
    # An idle server writes its gauges every 30 seconds.
    wait_until_idle(server)
    metrics = wait_until(server, lambda m: m["sglang:kv_used_tokens"] == 0, "an unused pool")
    assert metrics["sglang:kv_available_tokens"] + metrics["sglang:kv_evictable_tokens"] == pool_tokens
    text = server.log.read_text(errors="replace").lower()
    words = ("leak", "mismatch") if expects_faults else ("leak", "mismatch", "traceback", "compression failed")
    for word in words:
        assert word not in text, server.log_tail(60)


def metasoft(response: dict) -> dict:
    meta = response["meta_info"]
    return {key.removeprefix("metasoft_"): value for key, value in meta.items() if key.startswith("metasoft_")}
