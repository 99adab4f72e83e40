"""Milliseconds of each stage of one compression on a GPU: torch operations against the kernels, Llama-3.1-8B's heads.

    python benchmarks/gpu_stages.py [--prompt-tokens 32768] [--ratio 4]

Without a GPU this only says what it would measure; ``--cpu`` runs it all the same. Each result is one line of JSON.
"""

import statistics
import time

import torch
from gpu_servers import LLAMA_8B, main, report
from metasoft_kernels.merge import attention_flow, gather
from metasoft_kernels.probe import attend
from metasoft_kernels.score import importance as mean_attention

from sglang_metasoft.pipeline.route import choose_routes
from sglang_metasoft.types import Plan, Scores

WINDOW, SINK, TARGETS, SOFT_TOKENS = 64, 4, 4, 32
REPEATS = 5


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


def measure(args) -> None:
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


if __name__ == "__main__":
    main(__doc__, measure, has_servers=False)
