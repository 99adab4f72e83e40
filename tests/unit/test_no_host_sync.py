"""The stages never wait for the device: fake CUDA tensors hold no data, so anything that reads a value raises."""

import pytest
import torch
from metasoft_kernels.probe.fused import attend
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sglang_metasoft.config import CONSOLIDATIONS, METHODS
from sglang_metasoft.consolidations import load_consolidation
from sglang_metasoft.pipeline.batch import FusedBatch
from sglang_metasoft.pipeline.layer import compress_layer
from sglang_metasoft.pipeline.probe import make_probe
from sglang_metasoft.types import Job, Plan, Prompt
from tests.kernels.launches import record
from tests.unit.methods import KEPT, SHAPE, TAIL, make_job, make_method, make_pool, make_prompt, make_tensors

FUSED_METHODS = {"metasoft": True, "judge_q": True, "snapkv": False}  # whether the fused score is all of theirs


def test_the_fake_device_notices_a_read():
    with FakeTensorMode(), pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        torch.empty(5, device="cuda").nonzero().shape[0].__index__()


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("consolidation", CONSOLIDATIONS)
@pytest.mark.parametrize("name", METHODS)
def test_a_layer_is_compressed_without_reading_a_value(name, consolidation, kernels, monkeypatch):
    launches = record(monkeypatch)
    with FakeTensorMode():
        device = torch.device("cuda")
        method = make_method(name, monkeypatch, device, consolidation=consolidation, kernels=kernels)
        job = make_job(make_probe(method, make_prompt(device)), device=device)
        t = job.probe.embeds.shape[0]
        q, k, v = make_tensors(t, device)
        out, routes, merged, is_finite = compress_layer(
            job, q, k, v, make_pool(device), method, method.gate_scale(1, 0, 3), 1
        )
    heads, groups, d = SHAPE.num_heads, SHAPE.num_kv_heads, SHAPE.head_dim
    assert out.shape == (t, heads, d) and routes.kept.shape == (groups, KEPT)
    assert merged.key.shape == merged.value.shape == (KEPT, groups, d) and merged.key.device.type == "cuda"
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


def make_long_job(method, span: int, device) -> Job:
    """A quarter of ``span`` entries stays."""
    ids = torch.zeros(span + TAIL, dtype=torch.int64, device=device)
    prompt = Prompt(ids[:span], ids[span:], span + TAIL, span + TAIL)
    probe = make_probe(method, prompt)._replace(context_slots=span + TAIL, first_position=span + TAIL)
    slots = torch.zeros(2 * span + TAIL, dtype=torch.int64, device=device)
    new_slots = slots[: span // 4]
    return Job(Plan(0, span, span // 4, 4), probe, slots[: span + TAIL], slots[:span], new_slots)


@pytest.mark.parametrize("consolidation", [name for name in CONSOLIDATIONS if load_consolidation(name).is_fused])
@pytest.mark.parametrize("name", FUSED_METHODS)
def test_a_fused_batch_reads_no_value_and_allocates_in_proportion_to_its_length(name, consolidation, monkeypatch):
    launches, largest = record(monkeypatch), []
    with FakeTensorMode():
        device = torch.device("cuda")
        method = make_method(name, monkeypatch, device, consolidation=consolidation)
        for span in (4000, 16_000):
            job = make_long_job(method, span, device)
            pool = make_pool(device)
            q, k, v = make_tensors(2 * job.probe.embeds.shape[0], device)
            launches.clear()
            with LargestTensor() as tensors:
                batch = FusedBatch([job, job], method, attend)
                _, consolidated, flags = batch.compress(q, k, v, pool, method.gate_scale(1, 0, 3), 1)
                batch.write(pool, consolidated)
            largest.append(tensors.elements)
            assert flags == [] and consolidated.kept_rows.shape == (3, 2 * (span // 4))
    assert largest[1] <= 4.1 * largest[0]
    names = [launch.kernel.__name__.strip("_") for launch in launches]
    own_score = 1 if FUSED_METHODS[name] else 2  # a method with a score of its own is asked job by job
    expected = ["attend_part", "merge_parts", *["importance"] * own_score]
    if consolidation == "key_bias":
        assert names == [*expected, "demote", "split_top", "pass_on", "pass_on", "biases", "move_biased"]
        return
    expected += ["split_top", *(["route", "carry", "flow"] if consolidation == "attention_flow" else [])]
    assert names == [*expected, "move"]
