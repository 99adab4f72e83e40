"""What Triton compiles in a warm-up, and what batches that are served afterwards would have it compile besides.

    python -m tests.kernels.served_variants CONSOLIDATION [METHOD]      # one line of JSON

On fake CUDA tensors, launches recorded; without TRITON_INTERPRET, whose kernels know of no variants.
"""

import json
import random
import sys

import pytest
import torch
from metasoft_kernels.probe.fused import attend
from torch._subclasses.fake_tensor import FakeTensorMode

from sglang_metasoft.compressor.entry_scorer import EntryScorer
from sglang_metasoft.pipeline.batch import FusedBatch
from sglang_metasoft.pipeline.probe import make_probe
from sglang_metasoft.pipeline.warm_up import warm_up
from sglang_metasoft.types import Job, Plan, Prompt
from tests.kernels.compile_ahead import source_of
from tests.kernels.launches import record
from tests.unit.methods import SHAPE, make_method, make_pool, make_tensors

CUDA = torch.device("cuda")
BATCHES, MOST_PROMPTS = 12, 5
WINDOWS = (None, 512)  # of layers


def variants(launches) -> set[str]:
    """What Triton compiles for these launches."""
    sources = (source_of(launch) for launch in launches)
    return {str((source.fn.__name__, source.signature, source.constants, source.attrs, kw)) for source, kw in sources}


def serve(method, spans: list[int], ratio: float, window: int | None) -> None:
    """One layer of prompts of these lengths."""
    jobs = []
    for span in spans:
        ids = torch.zeros(span + 64, dtype=torch.int64, device=CUDA)
        probe = make_probe(method, Prompt(ids[:span], ids[span:], span + 64, span + 64))
        plan = Plan(0, span, max(16, int(span / ratio)), 4, ends_at_boundary=span % 2 == 0)
        jobs.append(Job(plan, probe, ids[: probe.context_slots], ids[:span], ids[: plan.kept_slots].clone()))
    pool = make_pool(CUDA)._replace(window_tokens=window)
    batch = FusedBatch(jobs, method, attend)
    q, k, v = make_tensors(batch.probe.total, CUDA)
    _, consolidated, _ = batch.compress(q, k, v, pool, method.gate_scale(1, 0, 3), 1)
    batch.write(pool, consolidated)


def main() -> None:
    consolidation, name, draw = sys.argv[1], [*sys.argv, "metasoft"][2], random.Random(3)
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode():
        launches = record(patch)
        patch.setattr(torch.cuda, "synchronize", lambda device: None)
        method = make_method(name, patch, CUDA, consolidation=consolidation)
        with CUDA:
            scorer = EntryScorer(SHAPE.num_layers, SHAPE.num_kv_heads, SHAPE.head_dim, 8)
        if name == "metasoft":
            method.soft_tokens.scorer = scorer.requires_grad_(False) if consolidation == "key_bias" else None
        for window in WINDOWS:
            pool = make_pool(CUDA)._replace(window_tokens=window)
            warm_up(method, attend, pool, SHAPE.num_heads, torch.float32)
        compiled = variants(launches)
        launches.clear()
        for _ in range(BATCHES):
            spans = [int(10 ** draw.uniform(2, 5)) for _ in range(draw.randint(1, MOST_PROMPTS))]
            serve(method, spans, draw.choice([2, 3.7, 8]), draw.choice(WINDOWS))
        served = variants(launches)
    print(json.dumps({"compiled": len(compiled), "served": len(served), "missing": sorted(served - compiled)}))


if __name__ == "__main__":
    main()
