"""One layer of a ragged batch through every fused kernel."""

import torch
from metasoft_kernels.bias import fused as bias_kernels
from metasoft_kernels.merge import fused as merge_kernels
from metasoft_kernels.move import fused as move_kernels
from metasoft_kernels.parts import Scored
from metasoft_kernels.probe import fused as probe_kernels
from metasoft_kernels.ragged import ragged
from metasoft_kernels.refine import fused as refine_kernels
from metasoft_kernels.refine.naive import Weights
from metasoft_kernels.repeats import fused as repeat_kernels
from metasoft_kernels.repeats.naive import Groups
from metasoft_kernels.route import fused as route_kernels
from metasoft_kernels.score import fused as score_kernels
from metasoft_kernels.select import fused as select_kernels
from metasoft_kernels.standing import fused as standing_kernels

LAYERS, WIDTH = 2, 32  # of the entry scorer


def launch_a_layer(heads, groups, d, dtype, pool_dtype, device, spans=(4000, 3001), kept=(1000, 750), probe_tokens=32):
    """All kernels that a layer of these requests launches."""
    key, value = (torch.empty(20_000, groups, d, dtype=pool_dtype, device=device) for _ in range(2))
    t = probe_tokens * len(spans)
    q = torch.empty(t, heads, d, dtype=dtype, device=device)
    k_new, v_new = (torch.empty(t, groups, d, dtype=dtype, device=device) for _ in range(2))
    counts = [[probe_tokens] * len(spans), [span + 64 for span in spans], spans, kept]
    probe, context, span, kept, dropped, sinks = ragged(
        device, *counts, [a - b for a, b in zip(spans, kept, strict=True)], [4] * len(spans)
    )
    context_slots, slots, new_slots = (
        torch.empty(axis.total, dtype=torch.int64, device=device) for axis in (context, span, kept)
    )
    scale = d**-0.5
    out, lse = probe_kernels.attend(q, key, value, context_slots, k_new, v_new, probe, context, scale, 0.5, 0.5)
    probe_kernels.attend(q, key, value, context_slots, k_new, v_new, probe, context, scale, 0.5, 0.5, 1024)
    probe_kernels.merge_with_self(q, out, lse, k_new, v_new, probe, scale, 0.7)
    mass = score_kernels.importance(q, key, slots, lse, probe, span, scale, 0.5)
    kept_rows, dropped_rows = select_kernels.split_top(mass, sinks.starts.diff(), span, kept, dropped)
    route = (key, slots, kept_rows, dropped_rows, kept, dropped, 4, scale, dtype)
    route_kernels.route(*route)
    target, weight = route_kernels.route(*route, 512)
    gate = torch.ones(groups, device=device)
    values, _ = merge_kernels.attention_flow(
        value, slots, mass, kept_rows, dropped_rows, target, weight, kept, gate, 0.5, dtype
    )
    move_kernels.move(key, value, slots, kept_rows, new_slots, values, 0.5)
    move_kernels.move(key, value, slots, kept_rows, new_slots)
    launch_a_biased_layer(key, value, slots, mass, span, kept, sinks.starts.diff(), new_slots, scale)


def launch_a_biased_layer(key, value, slots, mass, span, kept, sinks, new_slots, scale) -> None:
    """The shipped compressor's stages after the score; then without one, and where importance is the attention."""
    groups, d = key.shape[1:]
    options = {"dtype": torch.float32, "device": key.device}
    heads = (2, LAYERS, groups)
    weights = Weights(
        torch.empty(*heads, d + d // 2 + 2, WIDTH, **options), torch.empty(*heads, WIDTH, **options),
        torch.empty(*heads, WIDTH, **options), torch.empty(heads, **options), torch.empty(heads, **options),
    )  # fmt: skip
    repeats = Groups(*(torch.empty(2, span.total, dtype=torch.int32, device=key.device) for _ in range(3)))
    kept_rows = torch.empty(groups, kept.total, dtype=torch.int32, device=key.device)
    directions = torch.empty(span.num_requests, LAYERS, groups, d, **options)[:, 1]
    scored = refine_kernels.log_importance(mass, key, value, slots, weights, sinks, 1, 0, span, 0.5, 0.5)
    standing = standing_kernels.better_standing(mass, key, slots, span)
    for worth in (scored, standing, Scored(mass, mass)):
        ranked = repeat_kernels.demote(worth, repeats, span)
        is_kept = select_kernels.mark_top(ranked, sinks, span, kept, kept_rows)
        biases = bias_kernels.log_biases(worth, is_kept, kept_rows, repeats, sinks, span, kept, ranked)
        move_kernels.move_biased(key, value, slots, kept_rows, new_slots, biases, directions, kept, scale, 0.5)
