"""The stages never wait for the device: fake CUDA tensors hold no data, so anything that reads a value raises."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from sglang_metasoft.config import CONSOLIDATIONS, METHODS
from sglang_metasoft.pipeline import compress_layer
from tests.unit.methods import KEPT, SHAPE, make_job, make_method, make_pool, make_prompt, make_tensors


def test_the_fake_device_notices_a_read():
    with FakeTensorMode(), pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        torch.empty(5, device="cuda").nonzero().shape[0].__index__()


@pytest.mark.parametrize("consolidation", CONSOLIDATIONS)
@pytest.mark.parametrize("name", METHODS)
def test_a_layer_is_compressed_without_reading_a_value(name, consolidation, monkeypatch):
    with FakeTensorMode():
        device = torch.device("cuda")
        method = make_method(name, monkeypatch, device, consolidation=consolidation)
        job = make_job(method.probe(make_prompt(device)), device=device)
        t = job.probe.embeds.shape[0]
        q, k, v = make_tensors(t, device)
        out, routes, merged, is_finite = compress_layer(
            job, q, k, v, make_pool(device), method, method.config, method.gate_scale(1, 0, 3), 1
        )
    heads, groups, d = SHAPE.num_heads, SHAPE.num_kv_heads, SHAPE.head_dim
    assert out.shape == (t, heads, d) and routes.kept.shape == (groups, KEPT)
    assert merged.key.shape == merged.value.shape == (KEPT, groups, d) and merged.key.device.type == "cuda"
    assert is_finite.shape == () and is_finite.device.type == "cuda"
