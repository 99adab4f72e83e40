"""First figures on a GPU: the stages of one compression, a long prompt's latency, and how many requests run at once.

    python benchmarks/gpu.py stages  [--prompt-tokens 32768] [--ratio 4]
    python benchmarks/gpu.py latency [--model demo] [--prompt-tokens 32768]
    python benchmarks/gpu.py load    [--model demo] [--prompt-tokens 32768] [-- --attention-backend triton]

``--model llama-8b`` (the default) has the shape of Llama-3.1-8B with random weights; ``demo`` is the demo model. Plain
SGLang and SGLang with ``--enable-metasoft`` are measured in the same run, one after the other; what follows ``--`` are
further flags of both. Without a GPU this only says what it would measure; ``--cpu`` runs it all the same. Each result
is one line of JSON.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from metasoft_kernels.merge import attention_flow, gather
from metasoft_kernels.probe import attend
from metasoft_kernels.score import importance as mean_attention

from sglang_metasoft.bench.watch import PeakWatcher
from sglang_metasoft.demo import model as demo_model
from sglang_metasoft.local_server import Server
from sglang_metasoft.pipeline.route import choose_routes
from sglang_metasoft.types import Plan, Scores

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 128000,
    "eos_token_id": 128001,
}  # fmt: skip
WINDOW, SINK, TARGETS, SOFT_TOKENS = 64, 4, 4, 32
REPEATS = 5


def report(**values) -> None:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(json.dumps(values | {"device": device, "date": time.strftime("%Y-%m-%d")}), flush=True)


def median_ms(run) -> float:
    """Median of several runs, after one to warm up; device time where there is a device."""
    run()
    times = []
    for _ in range(REPEATS):
        if torch.cuda.is_available():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            start = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - start))
    return round(statistics.median(times), 3)


# -- stages --------------------------------------------------------------------------------------------------------


def stages(args) -> None:
    """One layer of one prompt, Llama-3.1-8B's heads: torch operations, and the kernels stage by stage."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    heads, groups, d, length = 32, 8, 128, args.prompt_tokens
    span, kept = length - WINDOW, -(-length // args.ratio) - WINDOW
    key, value = (torch.randn(2 * length, groups, d, dtype=torch.bfloat16, device=device) for _ in range(2))
    slots = torch.randperm(2 * length, device=device)[:length]
    q = torch.randn(SOFT_TOKENS, heads, d, dtype=torch.bfloat16, device=device)
    k, v = (torch.randn(SOFT_TOKENS, groups, d, dtype=torch.bfloat16, device=device) for _ in range(2))
    plan, scale = Plan(0, span, kept, SINK), d**-0.5
    _, lse = attend(q, key, value, slots, k, v, scale)
    importance = mean_attention(q, key, slots[:span], lse, scale)
    keys, values = key[slots[:span]], value[slots[:span]]
    routes = choose_routes(plan, Scores(importance), keys, TARGETS, scale)

    def merge(kernels="auto"):
        return gather(keys, routes.kept), attention_flow(values, importance, *routes, kernels=kernels).to(values.dtype)

    kept_keys, merged = merge()

    def write():
        key[slots[:kept]], value[slots[:kept]] = kept_keys, merged

    layers = LLAMA_8B["num_hidden_layers"]
    for kernels in ("torch", "triton") if device == "cuda" else ("torch",):
        times = {
            "probe": median_ms(lambda name=kernels: attend(q, key, value, slots, k, v, scale, kernels=name)),
            "score": median_ms(lambda name=kernels: mean_attention(q, key, slots[:span], lse, scale, kernels=name)),
            "select_and_route": median_ms(
                lambda name=kernels: choose_routes(plan, Scores(importance), keys, TARGETS, scale, name)
            ),
            "merge": median_ms(lambda name=kernels: merge(name)),
            "write": median_ms(write),
        }
        report(what="stages", kernels=kernels, prompt_tokens=length, ratio=args.ratio, ms_per_layer=times,
               ms_per_prompt=round(layers * sum(times.values()), 1))  # fmt: skip


# -- servers -------------------------------------------------------------------------------------------------------


def prepare_model(name: str, folder: Path, prompt_tokens: int) -> tuple[Path, list[str], int]:
    """Folder, flags and vocabulary size."""
    if name == "demo":
        return demo_model.prepare(Path(".demo") / "SmolLM2-135M-Instruct"), [], 49_000
    (folder / "config.json").write_text(json.dumps(LLAMA_8B))
    return folder, ["--load-format", "dummy", "--skip-tokenizer-init"], 128_000


def run_servers(args, measure, common: list[str]) -> None:
    """``measure(server, prompt maker)`` on each kind of server."""
    with tempfile.TemporaryDirectory() as scratch:
        model, flags, vocab_size = prepare_model(args.model, Path(scratch), args.prompt_tokens)
        metasoft = ["--enable-metasoft", "--metasoft-ratio", str(args.ratio), "--metasoft-during-prefill"]
        for name, own in (("plain", []), ("metasoft", metasoft)):
            source = random.Random(1)  # the same prompts for both

            def make_prompt(source=source):
                return [source.randrange(vocab_size) for _ in range(args.prompt_tokens)]

            log = Path(scratch) / f"{name}.log"
            with Server(model, [*flags, *common, *own, *args.flags, "--enable-metrics"], log=log) as server:
                server.generate(make_prompt()[:1000], 4)
                report(what=args.what, server=name, model=args.model, prompt_tokens=args.prompt_tokens,
                       ratio=args.ratio, **measure(server, make_prompt))  # fmt: skip


def latency(args) -> None:
    """Seconds of a prompt's prefill (and compression), and milliseconds of a decode step after it."""

    def seconds(server, prompt, new_tokens) -> float:
        begin = time.perf_counter()
        server.generate(prompt, new_tokens, sampling_params={"ignore_eos": True})
        return time.perf_counter() - begin

    def measure(server, make_prompt) -> dict:
        prefills, steps = [], []
        for _ in range(3):
            prompt = make_prompt()
            prefills.append(seconds(server, prompt, 2))
            few, many = (seconds(server, prompt, count) for count in (2, 130))  # the prompt is cached by now
            steps.append((many - few) / 128)
        return {
            "prefill_seconds": round(statistics.median(prefills), 3),
            "decode_step_ms": round(1e3 * statistics.median(steps), 3),
        }

    run_servers(args, measure, ["--max-total-tokens", str(4 * args.prompt_tokens)])


def load(args) -> None:
    """Requests decoding at once and output tokens a second, in a pool of four raw prompts and in one for all."""

    def measure(server, make_prompt) -> dict:
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
        run_servers(args, measure, ["--max-total-tokens", str(prompts * (args.prompt_tokens + 264))])


MEASURES = {"stages": stages, "latency": latency, "load": load}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=MEASURES)
    parser.add_argument("--model", choices=("llama-8b", "demo"), default="llama-8b")
    parser.add_argument("--prompt-tokens", type=int, default=32_768)
    parser.add_argument("--ratio", type=int, default=4)
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--cpu", action="store_true", help="measure although there is no GPU")
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args = parser.parse_args(sys.argv[1:end])
    args.flags = sys.argv[end + 1 :]
    if not torch.cuda.is_available() and not args.cpu:
        print(f"No GPU here. Would measure: {MEASURES[args.what].__doc__}")
        return
    MEASURES[args.what](args)


if __name__ == "__main__":
    main()
