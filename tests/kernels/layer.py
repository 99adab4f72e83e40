"""One layer of a ragged batch through every fused stage."""

import torch
from metasoft_kernels.probe import fused as probe_kernels
from metasoft_kernels.ragged import ragged
from metasoft_kernels.score import fused as score_kernels


def launch_a_layer(heads, groups, d, dtype, pool_dtype, device, spans=(4000, 3001), kept=(1000, 750), probe_tokens=32):
    """All kernels that a layer of two requests launches."""
    key, value = (torch.empty(20_000, groups, d, dtype=pool_dtype, device=device) for _ in range(2))
    t = probe_tokens * len(spans)
    q = torch.empty(t, heads, d, dtype=dtype, device=device)
    k_new, v_new = (torch.empty(t, groups, d, dtype=dtype, device=device) for _ in range(2))
    context = [span + 64 for span in spans]
    probe_axis, context_axis, span_axis = ragged(device, [probe_tokens] * len(spans), context, spans)
    context_slots = torch.empty(context_axis.total, dtype=torch.int64, device=device)
    slots = torch.empty(span_axis.total, dtype=torch.int64, device=device)
    scale = d**-0.5
    out, lse = probe_kernels.attend(
        q, key, value, context_slots, k_new, v_new, probe_axis, context_axis, scale, 0.5, 0.5
    )
    probe_kernels.merge_with_self(q, out, lse, k_new, v_new, probe_axis, scale)
    return score_kernels.importance(q, key, slots, lse, probe_axis, span_axis, scale, 0.5)
