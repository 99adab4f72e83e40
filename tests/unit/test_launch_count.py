"""A layer of the shipped path is a dozen launches at most, however many prompts finish together."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sglang_metasoft.pipeline.memory import LIST_BYTES, WORKSPACE_BYTES, batch_bytes, layer_bytes, prompts_together
from tests.kernels.count_launches import RATIO, SHAPE, WINDOW, Work, count
from tests.kernels.launches import record

MOST = 12


@pytest.mark.parametrize("prompts", [1, 4, 16])
@pytest.mark.parametrize(("name", "expected"), [("metasoft", 11), ("snapkv_keydiff", 12)])
def test_a_layer_with_and_without_a_compressor(name, expected, prompts, monkeypatch):
    launches = record(monkeypatch, holds_args=False)
    with FakeTensorMode():
        found = count(prompts, 3000, launches, name)
    assert found["torch"] == {} and found["launches_per_layer"] == sum(found["kernels"].values()) == expected <= MOST


def test_operations_of_torch_are_counted_where_they_run_on_the_device():
    with FakeTensorMode(), Work() as work:
        on_device = torch.empty(6, device="cuda")
        on_device.view(2, 3).t()[1:].unsqueeze(0)
        torch.zeros(5).add(1)
        assert not work.names
        torch.cat([on_device + 1, on_device])
    assert work.names.total() == 2


@pytest.mark.parametrize(("prompts", "tokens", "pieces"), [(1, 32_768, 1), (16, 32_768, 1), (1, 2**20, 3)])
def test_the_workspace_is_bounded(prompts, tokens, pieces, monkeypatch):
    """64 MiB beside the pool, the probe's scratch memory included; the lists of the tokens come on top."""
    launches = record(monkeypatch, holds_args=False)
    with FakeTensorMode():
        found = count(prompts, tokens, launches)
    assert found["kernels"]["split_top"] == pieces
    assert 0.5 * WORKSPACE_BYTES < found["layer_mib"] * 2**20 <= WORKSPACE_BYTES or prompts * tokens < 2**16
    assert found["lists_bytes_per_token"] <= LIST_BYTES - 24  # its own slots and ids are there already
    groups, span, kept = SHAPE.num_kv_heads, tokens - WINDOW, tokens // RATIO - WINDOW
    assert layer_bytes(groups, prompts * span, prompts * kept) <= WORKSPACE_BYTES


def test_prompts_that_are_too_much_together_go_one_after_the_other():
    def parts_of(*megabytes):
        sizes = [size * 2**20 for size in megabytes]
        return [list(megabytes[part]) for part in prompts_together(len(sizes), lambda part: sum(sizes[part]))]

    assert parts_of(10, 20, 30) == [[10, 20, 30]] and parts_of(10, 20, 40) == [[10, 20], [40]]
    assert parts_of(90) == [[90]] and parts_of(90, 1, 63, 1) == [[90], [1, 63], [1]]


def test_what_a_batch_takes_grows_with_its_prompts():
    def of(prompts, tokens):
        return batch_bytes([32] * prompts, [tokens] * prompts, [(tokens, tokens // 4)] * prompts, 32, 8, 128)

    assert of(1, 4096) < of(1, 32_768) < of(16, 32_768) <= WORKSPACE_BYTES < of(64, 32_768)
    assert of(1, 2**20) <= WORKSPACE_BYTES < of(3, 2**20)
