"""How many long requests decode at the same time, with and without compression, in an equally small KV pool.

The pool holds four raw prompts of 2,048 tokens plus their output. The same requests go to plain SGLang, to SGLang with
``--enable-metasoft`` and to the same with ``--metasoft-during-prefill``; the figure is the largest
``sglang:num_running_reqs`` that each server reports of itself.

    python benchmarks/memory.py [--requests 18] [--output memory.json] [--plot memory.png]

With ``--over-admit`` SGLang is not told that every output is of full length: it expects some to end early, lets more
requests in than fit to their end, and retracts. That counts retractions with and without compression.
"""

import argparse
import itertools
import json
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from sglang_metasoft.bench import result_file
from sglang_metasoft.bench.watch import PeakWatcher
from sglang_metasoft.data import DOCUMENT
from sglang_metasoft.demo import model as demo_model
from sglang_metasoft.local_server import Server

PROMPT_TOKENS = 2048
RAW_PROMPTS = 4
COMMON = ["--enable-metrics", "--decode-log-interval", "1", "--chunked-prefill-size", "256"]
METASOFT = ["--enable-metasoft", "--metasoft-path", demo_model.COMPRESSOR, "--metasoft-min-tokens", "128"]
SYSTEMS = {"plain": [], "metasoft": METASOFT, "during_prefill": [*METASOFT, "--metasoft-during-prefill"]}


def measure(model: Path, flags: list[str], prompts: list[list[int]], new_tokens: int, over_admit: bool) -> dict:
    """Send all prompts at once; returns the peak of running requests, seconds, retractions and bypass reasons."""
    # SGLang admits a request only if more than its tokens and a page are free: eight slots each let four in.
    pool_tokens = RAW_PROMPTS * (PROMPT_TOKENS + new_tokens + 8)
    # Either way each output has new_tokens.
    sampling = {"min_new_tokens": new_tokens} if over_admit else {"ignore_eos": True}
    with tempfile.TemporaryDirectory() as scratch:
        all_flags = [*COMMON, "--max-total-tokens", str(pool_tokens), *flags]
        with Server(model, all_flags, log=Path(scratch) / "server.log") as server:
            begin, cpu_begin = time.monotonic(), server.cpu_seconds()
            with PeakWatcher(server) as watcher, ThreadPoolExecutor(len(prompts)) as pool:
                responses = list(
                    pool.map(lambda ids: server.generate(ids, new_tokens, sampling_params=sampling), prompts)
                )
            seconds, cpu_seconds = time.monotonic() - begin, server.cpu_seconds() - cpu_begin
    metas = [response["meta_info"] for response in responses]
    assert all(meta["completion_tokens"] == new_tokens for meta in metas)
    return {
        "peak_running_requests": watcher.peak_running,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "retractions": sum(meta["num_retractions"] for meta in metas),
        "bypassed": sorted(meta["metasoft_bypass"] for meta in metas if "metasoft_bypass" in meta),
        "pool_tokens": pool_tokens,
        "series": steps(watcher.series),
    }


def steps(series: list[tuple]) -> list[tuple]:
    """The samples at which the running requests changed, and the last one."""
    changed = [now for before, now in itertools.pairwise(series) if before[1] != now[1]]
    return [series[0], *changed, series[-1]]


def plot(result: dict, path: Path) -> None:
    """Running requests over time, one line a server: where there is no accelerator over CPU seconds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 3.2), layout="constrained")
    for name, label, color in (
        ("during_prefill", "--enable-metasoft --metasoft-during-prefill, ratio 4", "#7fb3d9"),
        ("metasoft", "--enable-metasoft, ratio 4", "#1668a8"),
        ("plain", "plain SGLang", "#8a8a8a"),
    ):
        wall_seconds, running, _, cpu_seconds = zip(*result[name]["series"], strict=True)
        seconds = wall_seconds if torch.accelerator.is_available() else cpu_seconds
        axes.step(seconds, running, where="post", label=label, color=color, linewidth=1.8)
    pool = result["plain"]["pool_tokens"]
    axes.set(
        xlabel="seconds" if torch.accelerator.is_available() else "CPU seconds of the scheduler",
        ylabel="requests decoding at once",
        title=f"{PROMPT_TOKENS:,}-token prompts, a KV pool of {pool:,} tokens (four raw prompts)",
        ylim=(0, 1.45 * max(result[name]["peak_running_requests"] for name in SYSTEMS)),
        xlim=(0, None),
    )
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=demo_model.FOLDER, help="where the demo model is kept")
    parser.add_argument("--requests", type=int, default=18, help="requests sent at once")
    parser.add_argument("--new-tokens", type=int, default=16, help="output tokens of each request")
    parser.add_argument("--over-admit", action="store_true", help="let SGLang expect that outputs end early")
    parser.add_argument("--output", type=Path, help="also write the result as JSON")
    parser.add_argument("--plot", type=Path, help="also draw it as PNG (needs matplotlib)")
    args = parser.parse_args()
    model = demo_model.prepare(args.folder / demo_model.NAME)
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model)(DOCUMENT.read_text())["input_ids"]
    # Different prompts: each starts elsewhere in the document, so none shares a prefix with another.
    prompts = [(ids[97 * n :] + ids)[:PROMPT_TOKENS] for n in range(args.requests)]
    result = {}
    for name, flags in SYSTEMS.items():
        result[name] = measure(model, flags, prompts, args.new_tokens, args.over_admit)
        print(name, json.dumps({key: value for key, value in result[name].items() if key != "series"}), flush=True)
    for name in ("metasoft", "during_prefill"):
        times = result[name]["peak_running_requests"] / result["plain"]["peak_running_requests"]
        print(f"running requests, {name}: {times:.2f}x")
    if args.output:
        result_file.write(args.output, result)
    if args.plot:
        plot(result, args.plot)


if __name__ == "__main__":
    main()
