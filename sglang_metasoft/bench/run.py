"""Runs every workload against both servers and writes what was measured."""

import itertools
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

from sglang_metasoft.bench.watch import PeakWatcher
from sglang_metasoft.bench.workloads import POOLS, WORKLOADS, Size
from sglang_metasoft.config import shown
from sglang_metasoft.local_server import Server

COUNTERS = {
    "retractions": "sglang:num_retracted_reqs_total",
    "cached_tokens": "sglang:cached_tokens_total",
    "prompt_tokens": "sglang:prompt_tokens_total",
    "reused_tokens": "sglang:metasoft_reused_tokens_total",
    "saved_slots": "sglang:metasoft_saved_slots_total",
}
LATENCIES = ("ttft", "itl", "e2e_latency")
SYSTEMS = ("plain", "metasoft")
# A server writes its gauges every 40 decode steps; short outputs end before that.
OBSERVED = ["--enable-metrics", "--decode-log-interval", "1"]


class BenchFailed(RuntimeError):
    """A workload did not run to its end; the message has the last lines of its output."""


def run_all(
    model: Path,
    size: Size,
    pools: list[str],
    workloads: list[str],
    metasoft_flags: list[str],
    server_flags: list[str],
    rounds: int = 1,
    say: Callable[[str], None] = print,
) -> dict:
    """Start each server once a pool and round, drive it with each workload.

    Args:
        model: model directory or hub id.
        size: of what is sent.
        pools, workloads: names of :data:`POOLS` and :data:`WORKLOADS`.
        metasoft_flags: of the compressing server alone, without ``--enable-metasoft``.
        server_flags: of both servers.
        rounds: how often all is measured; every second time in reverse order of the servers, so that what drifts on
            a shared machine meets both.
        say: progress, a line at a time.

    Returns:
        ``{"machine": …, "results": [record, …]}``; a record has ``pool``, ``workload``, ``system``, ``round``
        and figures.

    Raises:
        ValueError: an unknown pool or workload, or a size that cannot be.
        BenchFailed, ServerFailed: something did not run.
    """
    check(size, pools, workloads, rounds)
    results = []
    for pool, turn in itertools.product(pools, range(rounds)):
        pool_tokens = size.pool_tokens(pool)
        for system in SYSTEMS[:: -1 if turn % 2 else 1]:
            own = ["--enable-metasoft", *metasoft_flags] if system == "metasoft" else []
            flags = [*OBSERVED, "--max-total-tokens", str(pool_tokens), *server_flags, *own]
            label = f"{pool} pool, {system}" + (f", round {turn + 1} of {rounds}" if rounds > 1 else "")
            say(f"{label}: starting")
            with (
                tempfile.TemporaryDirectory() as scratch,
                Server(model, flags, log=Path(scratch) / "server.log") as server,
            ):
                for name in workloads:
                    record = drive(server, model, name, size, Path(scratch))
                    where = {"pool": pool, "pool_tokens": pool_tokens, "system": system, "round": turn}
                    results.append(where | record)
                    say(
                        f"{label}, {name}: {record['peak_running']} at once, "
                        f"{record['output_tokens_per_second']:.1f} tokens/s"
                    )
    return {"machine": describe_machine(), "model": str(model), "size": size._asdict(), "results": results}


def check(size: Size, pools: list[str], workloads: list[str], rounds: int = 1) -> None:
    """Raise ValueError, naming the value and the allowed ones, unless all this can be run."""
    for what, given, allowed in (("pool", pools, POOLS), ("workload", workloads, tuple(WORKLOADS))):
        for name in given:
            if name not in allowed:
                raise ValueError(f"bench: {what} {shown(name)} is not allowed; allowed: {', '.join(allowed)}")
    numbers = size._asdict() | {"rounds": rounds}
    for name, least in (("prompt_tokens", 64), ("output_tokens", 2), ("requests", 1), ("rounds", 1)):
        if (value := numbers[name]) < least:
            raise ValueError(f"bench: {name} {value} is not allowed; allowed: an integer >= {least}")


def drive(server: Server, model: Path, name: str, size: Size, folder: Path) -> dict:
    """One workload against a running server, from an empty cache; returns the record's figures."""
    output = folder / f"{name}.jsonl"
    command = [
        sys.executable, "-m", "sglang.benchmark.serving", "--backend", "sglang", "--base-url", server.url,
        "--model", str(model), "--output-file", str(output), "--seed", "1", "--flush-cache", "--warmup-requests", "0",
        "--disable-tqdm", *WORKLOADS[name](size),
    ]  # fmt: skip
    before, cpu_before = server.metrics(), server.cpu_seconds()
    with PeakWatcher(server) as watcher:
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    if done.returncode or not output.is_file():
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
        raise BenchFailed(f"bench: workload {name} failed:\n{tail}")
    measured = json.loads(output.read_text().splitlines()[-1])
    after, cpu_seconds = server.metrics(), server.cpu_seconds() - cpu_before
    record = {
        "workload": name,
        "completed": measured["completed"],
        "seconds": measured["duration"],
        "cpu_seconds": cpu_seconds,
        "output_tokens_per_second": measured["output_throughput"],
        "peak_running": watcher.peak_running,
        "peak_used_tokens": watcher.peak_used_tokens,
        "series": watcher.series,
    }
    for kind in LATENCIES:
        record |= {f"{kind}_{at}_ms": measured[f"{at}_{kind}_ms"] for at in ("mean", "median", "p99")}
    return record | {key: after.get(full, 0) - before.get(full, 0) for key, full in COUNTERS.items()}


def describe_machine() -> dict:
    """Hardware, versions and date, for whoever reads the figures."""
    has_gpu = torch.cuda.is_available()
    return {
        "accelerator": torch.cuda.get_device_name() if has_gpu else "none",
        "cpu": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "sglang": version("sglang"),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
    }
