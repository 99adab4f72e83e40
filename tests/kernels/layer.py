"""One layer of a ragged batch through every fused kernel."""

import torch
from metasoft_kernels.merge import fused as merge_kernels
from metasoft_kernels.move import fused as move_kernels
from metasoft_kernels.probe import fused as probe_kernels
from metasoft_kernels.ragged import ragged
from metasoft_kernels.route import fused as route_kernels
from metasoft_kernels.score import fused as score_kernels
from metasoft_kernels.select import fused as select_kernels


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
