"""The stages never wait for the device: fake CUDA tensors hold no data, so anything that reads a value raises."""

import pytest
import torch
from metasoft_kernels.move.fused import move
from metasoft_kernels.probe.fused import attend
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sglang_metasoft.batch import FUSED_CONSOLIDATIONS, FusedBatch
from sglang_metasoft.config import CONSOLIDATIONS, METHODS, MetaSoftConfig
from sglang_metasoft.pipeline import compress_layer
from sglang_metasoft.score import load_method
from sglang_metasoft.soft_tokens import SoftTokens
from sglang_metasoft.types import Job, LayerPool, ModelShape, Plan, Probe, Prompt
from tests.kernels.launches import record

SHAPE = ModelShape("fake", 1000, 48, 2, 6, 3, 16)


def test_the_fake_device_notices_a_read():
    with FakeTensorMode(), pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        torch.empty(5, device="cuda").nonzero().shape[0].__index__()


@pytest.fixture
def load(monkeypatch):
    """Makes a method and one prompt's job, inside the fake mode."""

    def make_soft_tokens(shape, count, embed, device):
        with device:
            return SoftTokens(48, 40, 8, 2, 3)

    monkeypatch.setattr(SoftTokens, "untrained", make_soft_tokens)

    def make(name, config, span=236, kept=40):
        device = torch.device("cuda")
        table = torch.empty(1000, 48, device=device)
        method = load_method(name)(config, SHAPE, lambda ids: table[ids], device)
        ids = torch.empty(span + 64, dtype=torch.int64, device=device)
        probe = method.probe(Prompt(ids[:span], ids[span:], context_slots=span + 64, context_tokens=span + 64))
        slots = torch.empty(span + 64 + kept, dtype=torch.int64, device=device)
        context = Probe(probe.embeds, span + 64, span + 64)
        return method, Job(Plan(0, span, kept, 4), context, slots[: span + 64], slots[:span], slots[span + 64 :])

    return make


def make_layer(t):
    """Pool, q, k and v of one layer."""
    buffers = (torch.empty(500, 3, 16, device="cuda") for _ in range(2))
    return LayerPool(*buffers, 0.25, 1.0, 1.0), *(torch.empty(t, heads, 16, device="cuda") for heads in (6, 3, 3))


@pytest.mark.parametrize("consolidation", CONSOLIDATIONS)
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_a_layer_is_compressed_without_reading_a_value(name, consolidation, kernels, load, monkeypatch):
    config = MetaSoftConfig(consolidation=consolidation, kernels=kernels)
    launches = record(monkeypatch)
    with FakeTensorMode():
        method, job = load(name, config)
        t = job.probe.embeds.shape[0]
        pool, q, k, v = make_layer(t)
        out, routes, merged, is_finite = compress_layer(job, q, k, v, pool, method, config, method.gate_scale(1, 0, 3))
    assert out.shape == (t, 6, 16) and routes.kept.shape == (3, 40)
    assert merged.key.shape == merged.value.shape == (40, 3, 16) and merged.key.device.type == "cuda"
    assert is_finite.shape == () and is_finite.device.type == "cuda"
    assert bool(launches) == (kernels == "auto")


class LargestTensor(TorchDispatchMode):
    """Notes the most elements of any tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("consolidation", FUSED_CONSOLIDATIONS)
@pytest.mark.parametrize("name", METHODS)
def test_a_fused_batch_reads_no_value_and_allocates_in_proportion_to_its_length(name, consolidation, load, monkeypatch):
    config = MetaSoftConfig(consolidation=consolidation)
    launches, largest = record(monkeypatch), []
    with FakeTensorMode():
        for span in (4000, 16_000):
            method, job = load(name, config, span, span // 4)
            pool, q, k, v = make_layer(2 * job.probe.embeds.shape[0])
            launches.clear()
            with LargestTensor() as tensors:
                batch = FusedBatch([job, job], method, config, attend)
                _, consolidated, flags = batch.compress(q, k, v, pool, method.gate_scale(1, 0, 3))
                move(
                    pool.key, pool.value, batch.span_slots, consolidated.kept_rows, batch.new_slots, consolidated.values
                )
            largest.append(tensors.elements)
            assert flags == [] and consolidated.kept_rows.shape == (3, 2 * (span // 4))
    assert largest[1] <= 4.1 * largest[0]
    names = [launch.kernel.__name__.strip("_") for launch in launches]
    own_score = 2 if name == "snapkv" else 1  # a method with a score of its own is asked job by job
    expected = ["attend_part", "merge_parts", *["importance"] * own_score, "split_top"]
    expected += ["route", "carry", "flow"] if consolidation == "attention_flow" else []
    assert names == [*expected, "move"]
