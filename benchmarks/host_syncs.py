"""Does compression make the scheduler wait for the device? Counted in profiler traces of the same work.

    python benchmarks/host_syncs.py [--plot docs/streams.png] [--keep traces/]

Plain SGLang, and SGLang with ``--enable-metasoft``, serve the same prompts while SGLang's own profiler records. Counted
are the CUDA calls in which the scheduler process waits (stream, device and event synchronisation). The picture shows
what the streams of the compressing server do. Without a GPU there is nothing to count; ``--cpu`` runs the
servers all the same.
"""

import argparse
import gzip
import json
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import requests
import torch

from sglang_metasoft.data import DOCUMENT
from sglang_metasoft.demo import model as demo_model
from sglang_metasoft.local_server import Server

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
VARIANTS = {"plain": [], "metasoft": ["--enable-metasoft"]}
PROMPT_TOKENS, NEW_TOKENS = 2048, 32


def record(server: Server, prompts: list[list[int]], folder: Path) -> list[dict]:
    """Events of the trace that SGLang's profiler writes while the prompts are served."""
    folder.mkdir(parents=True)
    server.generate(prompts.pop(), NEW_TOKENS)
    body = {"output_dir": str(folder), "activities": ["CPU", "GPU"] if torch.cuda.is_available() else ["CPU"]}
    requests.post(f"{server.url}/start_profile", json=body, timeout=60).raise_for_status()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda ids: server.generate(ids, NEW_TOKENS, sampling_params={"ignore_eos": True}), prompts))
    requests.post(f"{server.url}/stop_profile", timeout=600).raise_for_status()
    deadline = time.monotonic() + 120
    while not (files := sorted(folder.rglob("*.trace.json.gz"))) and time.monotonic() < deadline:
        time.sleep(1)
    time.sleep(2)
    return json.loads(gzip.open(files[0]).read())["traceEvents"]


def count_waits(events: list[dict]) -> dict:
    """Waiting calls, by name."""
    waits = Counter(event["name"] for event in events if event.get("name") in WAITS)
    return {"events": len(events), "waits": dict(waits), "total": sum(waits.values())}


def plot(events: list[dict], path: Path, milliseconds: float = 400) -> None:
    """Kernels by stream, and the moments in which the host waited."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kernels = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    begin = min(event["ts"] for event in kernels)
    kernels = [event for event in kernels if event["ts"] - begin < 1e3 * milliseconds]
    streams = sorted({event["tid"] for event in kernels}, key=str)
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.5 * len(streams)), layout="constrained")
    for row, stream in enumerate(streams):
        spans = [((event["ts"] - begin) / 1e3, event["dur"] / 1e3) for event in kernels if event["tid"] == stream]
        axes.broken_barh(spans, (row - 0.4, 0.8), color="#1668a8")
    waits = [(event["ts"] - begin) / 1e3 for event in events if event.get("name") in WAITS]
    axes.vlines([at for at in waits if 0 <= at < milliseconds], -0.5, len(streams) - 0.5, color="#c0392b", lw=0.5)
    axes.set(xlabel="milliseconds", yticks=range(len(streams)), yticklabels=[f"stream {name}" for name in streams])
    axes.set_title("SGLang --enable-metasoft: kernels by stream; red: the host waits")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--keep", type=Path, help="folder for the traces")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--cpu", action="store_true", help="run although there is no GPU")
    args = parser.parse_args()
    if not torch.cuda.is_available() and not args.cpu:
        print("No GPU here. Would count the calls in which the scheduler waits, with and without compression.")
        return
    model = demo_model.prepare(demo_model.PATH)
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model)(DOCUMENT.read_text())["input_ids"]
    ids = ids + ids
    prompts = [ids[97 * n :][:PROMPT_TOKENS] for n in range(args.prompts + 1)]
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.keep or Path(scratch) / "traces"
        for name, flags in VARIANTS.items():
            with Server(model, flags, log=Path(scratch) / f"{name}.log") as server:
                events = record(server, list(prompts), folder / name)
            print(name, json.dumps(count_waits(events)), flush=True)
        if args.plot:
            plot(events, args.plot)


if __name__ == "__main__":
    main()
