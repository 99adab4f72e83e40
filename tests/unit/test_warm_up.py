"""After the warm-up nothing is compiled, and the room for the stages is there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from metasoft_kernels.probe.fused import attend
from torch._subclasses.fake_tensor import FakeTensorMode

from sglang_metasoft.pipeline.memory import WORKSPACE_BYTES
from sglang_metasoft.pipeline.warm_up import lengths, warm_up
from tests.kernels.count_launches import Work
from tests.kernels.launches import record
from tests.unit.methods import SHAPE, make_method, make_pool

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("served", [("key_bias",), ("attention_flow",), ("none",), ("key_bias", "snapkv_keydiff")])
def test_nothing_is_compiled_after_it(served):
    """Batches of one to five prompts of 100 to 100,000 tokens, at several ratios."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = f"{ROOT}:{environment.get('PYTHONPATH', '')}"
    command = [sys.executable, "-m", "tests.kernels.served_variants", *served]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["compiled"] >= found["served"] > 5 and found["missing"] == []


def test_the_workspace_is_taken_at_start_up(monkeypatch):
    """A device without that room says so before the server is ready."""
    launches, waited, device = record(monkeypatch, holds_args=False), [], torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    with FakeTensorMode():
        method = make_method("metasoft", monkeypatch, device, consolidation="key_bias")
        pool = make_pool(device)
        with Work() as work:
            assert warm_up(method, attend, pool, SHAPE.num_heads, torch.float32) > 0
    assert work.peak_bytes == WORKSPACE_BYTES and launches
    assert [where.type for where in waited] == ["cuda"]


def test_every_block_of_the_selection_is_met():
    method = make_method("metasoft", consolidation="attention_flow")
    found = lengths(method)
    assert [span for span, _ in found[:-1]] == [256, 512, 1024, 2048, 4096]
    assert found[-1][1] > method.config.route_band and all(kept < span for span, kept in found)
