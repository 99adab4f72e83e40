"""What one compression costs on a GPU: bytes, flops and time of each stage, against what the hardware can do.

    python benchmarks/kernels.py [--model llama-3.1-8b qwen3-8b] [--prompt-tokens 4096 32768 131072] [--ratio 4 8]
                                 [--band 4096] [--prompts 1]

Bytes and flops are counted from shapes: what a stage must at least read, write and multiply. On a GPU each stage is
timed as replays of a CUDA graph (the device's own time) and launch by launch (``microseconds_launched``: the larger of
that and the host's time), and so are a copy, a bf16 product and this prompt's prefill (attention by FlashInfer, or by
torch where that is absent, and the layer's products), all in the same run. Without a GPU, times are **projections**:
the larger of bytes over an H200's nominal bandwidth and flops over its nominal dense bf16 rate. Each result is one line
of JSON.
"""

import argparse
import json
import statistics
import time
from typing import NamedTuple

import torch
from metasoft_kernels.bias import fused as bias_kernels
from metasoft_kernels.merge import fused as merge_kernels
from metasoft_kernels.move import fused as move_kernels
from metasoft_kernels.probe import fused as probe_kernels
from metasoft_kernels.probe.flashinfer_probe import FlashInferProbe
from metasoft_kernels.ragged import ragged
from metasoft_kernels.refine import fused as refine_kernels
from metasoft_kernels.refine.naive import Weights
from metasoft_kernels.repeats import fused as repeat_kernels
from metasoft_kernels.repeats.naive import Groups
from metasoft_kernels.route import fused as route_kernels
from metasoft_kernels.score import fused as score_kernels
from metasoft_kernels.select import fused as select_kernels
from metasoft_kernels.select import naive as select_naive
from metasoft_kernels.standing import fused as standing_kernels

from sglang_metasoft.config import MetaSoftConfig
from sglang_metasoft.consolidations.repeats import group_repeats

WINDOW, SINK, TARGETS, SOFT_TOKENS = 64, 4, 4, 32
SCORER_WIDTH, WORDS = 32, 20_000  # of the entry scorer; drawn from so many, the frequent ones more often
STAGES = {  # of a layer, by what is served
    "none": ("probe", "score", "select", "move"),
    "attention_flow": ("probe", "score", "select", "route", "merge", "move"),
    "key_bias": ("probe", "score", "refine", "repeats", "mark", "bias", "move_biased"),  # the shipped compressor
    "snapkv_keydiff": ("probe", "score", "standing", "repeats", "mark", "bias", "move_biased"),  # without a compressor
}
ENTRY_BYTES = 2  # bf16
# NVIDIA's data sheet of the H200 SXM: HBM3e bandwidth, and bf16 tensor cores without sparsity.
H200_BYTES_PER_SECOND, H200_FLOPS_PER_SECOND = 4.8e12, 989e12
FLOAT32_FLOPS_PER_SECOND = 67e12  # the same sheet, without tensor cores
REPEATS = 20


class Model(NamedTuple):
    layers: int
    hidden: int
    heads: int
    groups: int
    head_dim: int
    intermediate: int

    @property
    def layer_weights(self) -> int:
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.groups)
        return attention + 3 * self.hidden * self.intermediate


MODELS = {
    "llama-3.1-8b": Model(32, 4096, 32, 8, 128, 14336),
    "llama-3.2-1b": Model(16, 2048, 32, 8, 64, 8192),
    "qwen3-8b": Model(36, 4096, 32, 8, 128, 12288),
}


class Cost(NamedTuple):
    """What a stage must move and multiply, at least, in one layer."""

    bytes: float
    flops: float = 0.0
    float32_flops: float = 0.0  # in float32, which no tensor core makes


class Batch(NamedTuple):
    """Prompts that finish together."""

    prompts: int
    tokens: int  # of each
    ratio: int
    band: int  # kept entries that a dropped one is compared with

    @property
    def span_tokens(self) -> int:
        return self.tokens - WINDOW

    @property
    def kept_slots(self) -> int:
        return -(-self.tokens // self.ratio) - WINDOW


def count(model: Model, batch: Batch) -> dict[str, Cost]:
    """Each stage's cost for one layer, in order; routing compares with ``band`` kept entries."""
    tokens, span, kept = batch.tokens, batch.span_tokens, batch.kept_slots
    dropped = span - kept
    groups, d, rows = model.groups, model.head_dim, SOFT_TOKENS * model.heads
    entry = groups * d * ENTRY_BYTES  # K or V of one token
    pairs = dropped * groups * TARGETS
    scores = 4 * span * groups  # one float32 for each entry and head
    groupings = 12 * span  # three int32 for each entry
    layer = {
        "probe": Cost(2 * tokens * entry, 4 * tokens * rows * d),
        "score": Cost(span * entry + 4 * span * groups, 2 * span * rows * d),
        "select": Cost(5 * 4 * span * groups + 4 * span * groups),
        "route": Cost((dropped + kept) * entry + 8 * pairs, 2 * dropped * min(batch.band, kept) * groups * d),
        # Sort by key (4 bytes) with its place (8 bytes), each read and written once per 8 of 32 bits; then each V once.
        "merge": Cost(pairs * 12 * 2 * 4 + pairs * 8 + (dropped + 2 * kept) * entry, 2 * pairs * d),
        "move": Cost(4 * kept * entry),
        "refine": Cost(2 * span * entry + 3 * scores, 0, 2 * span * groups * (1.5 * d + 2) * SCORER_WIDTH),
        "standing": Cost(2 * span * entry + 5 * scores, 0, 6 * span * groups * d),
        "repeats": Cost(2 * scores + groupings),
        "mark": Cost(5 * scores + span * groups + 4 * kept * groups),
        "bias": Cost(2 * (4 * scores + span * groups + groupings) + 8 * kept * groups),
        "move_biased": Cost(4 * kept * entry + 8 * kept * groups),
    }
    return {stage: Cost(*(batch.prompts * part for part in cost)) for stage, cost in layer.items()}


def prefill_flops(model: Model, batch: Batch) -> float:
    """One layer's products with weights, and its causal attention."""
    products, attention = 2 * batch.tokens * model.layer_weights, 2 * batch.tokens**2 * model.heads * model.head_dim
    return batch.prompts * (products + attention)


def probe_flops(model: Model, batch: Batch) -> float:
    """The probe tokens' own pass through one layer's weights."""
    return 2 * batch.prompts * SOFT_TOKENS * model.layer_weights


def milliseconds(run, repeats: int = REPEATS) -> float:
    """Median time between two events around one run."""
    run()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def graph_milliseconds(run, repeats: int = REPEATS) -> float:
    """Median time of a CUDA graph that holds one run: the device's own, without what the host takes to launch."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return milliseconds(graph.replay, repeats)


def measure_device() -> Cost:
    """Bytes per second of a large copy (read and write counted), and flops per second of a large bf16 product."""
    source = torch.empty(2**29, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    copy_ms = milliseconds(lambda: target.copy_(source))
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    product_ms = milliseconds(lambda: a @ b)
    return Cost(2 * source.numel() * 2 / copy_ms * 1e3, 2 * 8192**3 / product_ms * 1e3)


def measure_stages(model: Model, batch: Batch) -> dict[str, float]:
    """Milliseconds of each stage for one layer of prompts whose slots are scattered over the pool."""
    device, dtype = torch.device("cuda"), torch.bfloat16
    heads, groups, d = model.heads, model.groups, model.head_dim
    prompts, tokens, span_tokens, kept_slots = batch.prompts, batch.tokens, batch.span_tokens, batch.kept_slots
    pool_slots = 2 * tokens * prompts
    key, value = (torch.randn(pool_slots, groups, d, dtype=dtype, device=device) for _ in range(2))
    slots = torch.randperm(pool_slots, device=device).view(prompts, 2 * tokens)
    context_slots, span_slots = slots[:, :tokens].flatten(), slots[:, :span_tokens].flatten()
    new_slots = slots[:, tokens : tokens + kept_slots].flatten()
    q = torch.randn(prompts * SOFT_TOKENS, heads, d, dtype=dtype, device=device)
    k, v = (torch.randn(prompts * SOFT_TOKENS, groups, d, dtype=dtype, device=device) for _ in range(2))
    lengths = [SOFT_TOKENS, tokens, span_tokens, kept_slots, span_tokens - kept_slots]
    probe, context, span, kept, dropped = ragged(device, *([length] * prompts for length in lengths))
    sinks = torch.full((prompts,), SINK, dtype=torch.int32, device=device)
    scale, gate = d**-0.5, torch.ones(groups, device=device)

    own_probe = (q, key, value, context_slots, k, v, probe, context, scale)
    _, lse = probe_kernels.attend(*own_probe)
    score = (q, key, span_slots, lse, probe, span, scale)
    mass = score_kernels.importance(*score)
    kept_rows, dropped_rows = select_kernels.split_top(mass, sinks, span, kept, dropped)
    route = (key, span_slots, kept_rows, dropped_rows, kept, dropped, TARGETS, scale, dtype, batch.band)
    target, weight = route_kernels.route(*route)
    merge = (value, span_slots, mass, kept_rows, dropped_rows, target, weight, kept, gate, 1.0, dtype)
    merged, _ = merge_kernels.attention_flow(*merge)
    directions = torch.randn(prompts, groups, d, device=device)
    groupings, weights, modes = draw_shipped(model, batch, device)
    refine = (mass, key, value, span_slots, weights, modes, 0, 0, span)
    scored = refine_kernels.log_importance(*refine)
    ranked = repeat_kernels.demote(scored, groupings, span)
    marked_rows = torch.empty_like(kept_rows)
    is_kept = select_kernels.mark_top(ranked, sinks, span, kept, marked_rows)
    bias = (scored, is_kept, marked_rows, groupings, sinks, span, kept)
    biases = bias_kernels.log_biases(*bias)
    biased = (key, value, span_slots, marked_rows, new_slots, biases, directions, kept, scale)
    stages = {
        "refine": lambda: refine_kernels.log_importance(*refine),
        "standing": lambda: standing_kernels.better_standing(mass, key, span_slots, span),
        "repeats": lambda: repeat_kernels.demote(scored, groupings, span),
        "mark": lambda: select_kernels.mark_top(ranked, sinks, span, kept, marked_rows),
        "bias": lambda: bias_kernels.log_biases(*bias),
        "move_biased": lambda: move_kernels.move_biased(*biased),
        "probe": lambda: probe_kernels.attend(*own_probe),
        "score": lambda: score_kernels.importance(*score),
        "select": lambda: select_kernels.split_top(mass, sinks, span, kept, dropped),
        "route": lambda: route_kernels.route(*route),
        "merge": lambda: merge_kernels.attention_flow(*merge),
        "move": lambda: move_kernels.move(key, value, span_slots, kept_rows, new_slots, merged),
    }
    times = {stage: graph_milliseconds(run) for stage, run in stages.items()}
    times |= {f"{stage}_launched": milliseconds(run) for stage, run in stages.items()}
    if prompts == 1:
        times["select_by_torch_sort"] = milliseconds(lambda: select_naive.split_top(mass, kept_slots, SINK))
        times["select_by_torch_topk"] = milliseconds(lambda: topk_of_composite_keys(mass, kept_slots))
    try:
        flashinfer = FlashInferProbe(heads, groups, d, dtype, dtype, device)
        times["probe_by_flashinfer"] = milliseconds(lambda: flashinfer.attend(*own_probe))
    except Exception as error:  # absent, or without kernels for this GPU
        print(f"FlashInfer not measured: {type(error).__name__}: {error}", flush=True)
    return times


def draw_shipped(model: Model, batch: Batch, device) -> tuple[Groups, Weights, torch.Tensor]:
    """Repeats of prompts of drawn words, an entry scorer's weights, and which of them each prompt takes."""
    d, width, heads = model.head_dim, SCORER_WIDTH, (2, 1, model.groups)
    ids = [(torch.rand(batch.span_tokens, device=device) ** 3 * WORDS).long() for _ in range(batch.prompts)]
    parts = zip(*(group_repeats(each) for each in ids), strict=True)
    shapes = ((*heads, d + d // 2 + 2, width), (*heads, width), (*heads, width), heads, heads)
    weights = Weights(*(torch.randn(shape, device=device) / 10 for shape in shapes))
    modes = torch.zeros(batch.prompts, dtype=torch.int32, device=device)
    return Groups(*(torch.cat(part, dim=1) for part in parts)), weights, modes


def topk_of_composite_keys(mass: torch.Tensor, kept: int) -> torch.Tensor:
    """A library's top-k made deterministic: the entry's own number, reversed, below its importance's bits."""
    place = torch.arange(mass.shape[1] - 1, -1, -1, device=mass.device)
    composite = (mass.view(torch.int32).to(torch.int64) << 32) | place
    return composite.topk(kept, dim=1, sorted=False).indices.sort(dim=1).values


def measure_prefill(model: Model, tokens: int) -> float:
    """Milliseconds of one layer: its products, and causal attention."""
    device, dtype = torch.device("cuda"), torch.bfloat16
    hidden = torch.randn(tokens, model.hidden, dtype=dtype, device=device)
    attention_width = model.heads * model.head_dim
    shapes = [
        (model.hidden, attention_width + 2 * model.groups * model.head_dim), (attention_width, model.hidden),
        (model.hidden, 2 * model.intermediate), (model.intermediate, model.hidden),
    ]  # fmt: skip
    total = 0.0
    for rows, columns in shapes:
        weight = torch.randn(rows, columns, dtype=dtype, device=device)
        given = hidden if rows == model.hidden else torch.randn(tokens, rows, dtype=dtype, device=device)
        total += milliseconds(lambda given=given, weight=weight: given @ weight, 5)
    del given, weight, hidden
    q = torch.randn(tokens, model.heads, model.head_dim, dtype=dtype, device=device)
    k, v = (torch.randn(tokens, model.groups, model.head_dim, dtype=dtype, device=device) for _ in range(2))
    try:
        from flashinfer import single_prefill_with_kv_cache

        return total + milliseconds(lambda: single_prefill_with_kv_cache(q, k, v, causal=True), 5)
    except Exception as error:  # absent, or without kernels for this GPU
        print(f"Prefill's attention by torch, not FlashInfer: {type(error).__name__}: {error}", flush=True)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    attend = torch.nn.functional.scaled_dot_product_attention
    return total + milliseconds(lambda: attend(q, k, v, is_causal=True, enable_gqa=True), 5)


def report(name: str, batch: Batch, device: Cost | None) -> dict:
    """One configuration; shares are of what the device was measured, or is said, to do."""
    model = MODELS[name]
    costs = count(model, batch)
    peak = device or Cost(H200_BYTES_PER_SECOND, H200_FLOPS_PER_SECOND)
    floors = {
        stage: 1e3
        * max(cost.bytes / peak.bytes, cost.flops / peak.flops, cost.float32_flops / FLOAT32_FLOPS_PER_SECOND)
        for stage, cost in costs.items()
    }
    times = measure_stages(model, batch) if device else floors
    if device:
        prefill_ms = batch.prompts * measure_prefill(model, batch.tokens)
    else:
        prefill_ms = 1e3 * prefill_flops(model, batch) / peak.flops
    # The probe tokens pass through the weights too: bound by reading them once.
    body_ms = 1e3 * max(model.layer_weights * ENTRY_BYTES / peak.bytes, probe_flops(model, batch) / peak.flops)
    stages = {
        stage: {
            "mega_bytes": round(cost.bytes / 1e6, 1),
            "giga_flops": round((cost.flops + cost.float32_flops) / 1e9, 1),
            "microseconds": round(1e3 * times[stage], 1),
            "microseconds_launched": round(1e3 * times[f"{stage}_launched"], 1) if device else None,
            "share_of_roofline": round(floors[stage] / times[stage], 2) if device else None,
        }
        for stage, cost in costs.items()
    }
    others = [key for key in times if key.removesuffix("_launched") not in costs]
    whole_ms, flowless_ms, shipped_ms = (
        sum(times[stage] for stage in STAGES[name]) for name in ("attention_flow", "none", "key_bias")
    )
    return {
        "times": "measured" if device else "PROJECTED from nominal H200 peaks, nothing was run",
        "model": name, "prompts": batch.prompts, "prompt_tokens": batch.tokens, "ratio": batch.ratio,
        "band": batch.band, "stages_of_a_layer": stages,
        "others_microseconds": {key: round(1e3 * times[key], 1) for key in others},
        "compression_ms": round(model.layers * (whole_ms + body_ms), 2),
        "prefill_ms": round(model.layers * prefill_ms, 1),
        "compression_percent_of_prefill": round(100 * (whole_ms + body_ms) / prefill_ms, 2),
        "without_consolidation_percent_of_prefill": round(100 * (flowless_ms + body_ms) / prefill_ms, 2),
        "shipped_compression_ms": round(model.layers * (shipped_ms + body_ms), 2),
        "shipped_percent_of_prefill": round(100 * (shipped_ms + body_ms) / prefill_ms, 2),
        "probe_percent_of_prefill": round(100 * (times["probe"] + body_ms) / prefill_ms, 2),
        "probe_attention_percent_of_prefill": round(100 * times["probe"] / prefill_ms, 2),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--prompt-tokens", nargs="+", type=int, default=[4096, 32_768, 131_072])
    parser.add_argument("--ratio", nargs="+", type=int, default=[4, 8])
    parser.add_argument("--band", type=int, default=MetaSoftConfig().route_band, help="route_band; default: its own")
    parser.add_argument("--prompts", type=int, default=1, help="that finish together")
    args = parser.parse_args()
    device = measure_device() if torch.cuda.is_available() else None
    about = {"device": torch.cuda.get_device_name() if device else "none", "date": time.strftime("%Y-%m-%d")}
    if device:
        about |= {"copy_tb_per_s": round(device.bytes / 1e12, 2), "bf16_tflops": round(device.flops / 1e12, 1)}
    print(json.dumps(about), flush=True)
    for name in args.model:
        for tokens in args.prompt_tokens:
            for ratio in args.ratio:
                batch = Batch(args.prompts, tokens, ratio, args.band)
                print(json.dumps(report(name, batch, device)), flush=True)


if __name__ == "__main__":
    main()
