"""The stages never wait for the device: fake CUDA tensors hold no data, so anything that reads a value raises."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from sglang_metasoft.config import CONSOLIDATIONS, METHODS, MetaSoftConfig
from sglang_metasoft.pipeline import compress_layer
from sglang_metasoft.score import load_method
from sglang_metasoft.soft_tokens import SoftTokens
from sglang_metasoft.types import Job, LayerPool, ModelShape, Plan, Probe, Prompt

SHAPE = ModelShape("fake", 1000, 48, 2, 6, 3, 16)


def test_the_fake_device_notices_a_read():
    with FakeTensorMode(), pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        torch.empty(5, device="cuda").nonzero().shape[0].__index__()


@pytest.mark.parametrize("consolidation", CONSOLIDATIONS)
@pytest.mark.parametrize("name", METHODS)
def test_a_layer_is_compressed_without_reading_a_value(name, consolidation, monkeypatch):
    config = MetaSoftConfig(consolidation=consolidation)

    def make_soft_tokens(shape, count, embed, device):
        with device:
            return SoftTokens(48, 40, 8, 2, 3)

    monkeypatch.setattr(SoftTokens, "untrained", make_soft_tokens)
    with FakeTensorMode():
        device = torch.device("cuda")
        table = torch.empty(1000, 48, device=device)
        method = load_method(name)(config, SHAPE, lambda ids: table[ids], device)
        ids = torch.empty(300, dtype=torch.int64, device=device)
        probe = method.probe(Prompt(ids[:236], ids[236:], context_slots=300, context_tokens=300))
        t = probe.embeds.shape[0]
        slots = torch.empty(400, dtype=torch.int64, device=device)
        job = Job(Plan(0, 236, 40, 4), Probe(probe.embeds, 300, 300), slots[:300], slots[:236], slots[300:340])
        pool = LayerPool(torch.empty(500, 3, 16, device=device), torch.empty(500, 3, 16, device=device), 0.25, 1.0, 1.0)
        q = torch.empty(t, 6, 16, device=device)
        k, v = torch.empty(t, 3, 16, device=device), torch.empty(t, 3, 16, device=device)
        out, routes, merged, is_finite = compress_layer(job, q, k, v, pool, method, config, method.gate_scale(1, 0, 3))
    assert out.shape == (t, 6, 16) and routes.kept.shape == (3, 40)
    assert merged.key.shape == merged.value.shape == (40, 3, 16) and merged.key.device.type == "cuda"
    assert is_finite.shape == () and is_finite.device.type == "cuda"
