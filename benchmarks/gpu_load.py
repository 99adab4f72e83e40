"""How many long requests decode at once on a GPU, and output tokens a second, in a tight and in an ample pool.

    python benchmarks/gpu_load.py [--model demo] [--prompt-tokens 32768] [-- --attention-backend triton]

How it is run: ``benchmarks/gpu_servers.py``.
"""

import time
from concurrent.futures import ThreadPoolExecutor

from gpu_servers import main, run_servers

from sglang_metasoft.bench.watch import PeakWatcher


def measure(args) -> None:
    """Requests decoding at once and output tokens a second, in a pool of four raw prompts and in one for all."""

    def one_server(server, make_prompt) -> dict:
        prompts = [make_prompt() for _ in range(args.requests)]
        begin = time.perf_counter()
        with PeakWatcher(server) as watcher, ThreadPoolExecutor(len(prompts)) as pool:
            options = {"sampling_params": {"ignore_eos": True}}
            metas = [r["meta_info"] for r in pool.map(lambda ids: server.generate(ids, 256, **options), prompts)]
        seconds = time.perf_counter() - begin
        return {
            "peak_running_requests": watcher.peak_running,
            "output_tokens_per_second": round(256 * len(prompts) / seconds, 1),
            "retractions": sum(meta["num_retractions"] for meta in metas),
            "bypassed": sum("metasoft_bypass" in meta for meta in metas),
        }

    for name, prompts in (("tight", 4), ("ample", args.requests + 1)):
        print(f"pool: {name}", flush=True)
        run_servers(args, "load", one_server, ["--max-total-tokens", str(prompts * (args.prompt_tokens + 264))])


if __name__ == "__main__":
    main(__doc__, measure)
