"""FlashInfer's plans while the device lags behind: a fake wrapper with the real one's memory, on a queue run by hand.

As in FlashInfer 0.7.2: ``plan`` writes the wrapper's page-locked buffer at once and queues its copy (``scheduler.cuh``,
``PrefillPlan`` and ``PrefillSM90Plan``), ``run`` reads what the copy brought. tests/gpu/test_probe_plans.py is the same
with the real one.
"""

import sys
from types import SimpleNamespace

import pytest
import torch
from metasoft_kernels.probe import flashinfer_probe
from metasoft_kernels.ragged import ragged
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.kernels.launches import record

HEADS, GROUPS, HEAD_DIM = 4, 2, 64


class Device:
    """One stream: what is queued runs in order, when the test says so."""

    def __init__(self):
        self.queue = []
        self.attended = []  # context tokens by which each run went

    def run_all(self, *_):
        while self.queue:
            self.queue.pop(0)()


def make_event(device: Device) -> type:
    class Event:
        waited = 0

        def record(self):
            self.passed = False
            device.queue.append(lambda: setattr(self, "passed", True))

        def query(self):
            return self.passed

        def synchronize(self):
            Event.waited += 1
            while not self.passed:
                device.queue.pop(0)()

    return Event


def make_wrapper(device: Device) -> type:
    class Wrapper:
        made = 0

        def __init__(self, workspace, layout):
            Wrapper.made += 1
            self.page_locked = self.on_device = None

        def plan(self, probe_starts, context_starts, indices, *args, **kwargs):
            self.page_locked = len(indices)
            device.queue.append(lambda: setattr(self, "on_device", self.page_locked))

        def run(self, q, pages, return_lse):
            device.queue.append(lambda: device.attended.append(self.on_device))
            return torch.empty_like(q), torch.empty(q.shape[:2], device=q.device)

    return Wrapper


@pytest.fixture
def lagging(monkeypatch):
    """A probe on a device that has not begun, and ``attend(tokens)``, a layer of a prompt of that length."""
    record(monkeypatch)
    device = Device()
    wrapper, event = make_wrapper(device), make_event(device)
    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(BatchPrefillWithPagedKVCacheWrapper=wrapper))
    monkeypatch.setattr(torch.cuda, "Event", event)
    monkeypatch.setattr(torch.cuda, "synchronize", device.run_all)
    with FakeTensorMode():
        cuda = torch.device("cuda")
        probe = flashinfer_probe.FlashInferProbe(HEADS, GROUPS, HEAD_DIM, torch.bfloat16, torch.bfloat16, cuda)
        entries = torch.empty(9, GROUPS, HEAD_DIM, dtype=torch.bfloat16, device=cuda)

        def prompt(tokens: int):
            new = torch.empty(3, GROUPS, HEAD_DIM, dtype=torch.bfloat16, device=cuda)
            slots = torch.empty(tokens, dtype=torch.int64, device=cuda)
            axes = ragged(cuda, [3], [tokens])
            return lambda: probe.attend(
                new.new_empty(3, HEADS, HEAD_DIM), entries, entries, slots, new, new, *axes, 0.1
            )

        device.attended.clear()
        yield SimpleNamespace(device=device, prompt=prompt, wrapper=wrapper, event=event)


def test_each_prompt_is_attended_by_its_own_plan(lagging):
    """Two compressions behind a long prefill, two layers each."""
    for attend in (lagging.prompt(60_000), lagging.prompt(9_000)):
        attend()
        attend()
    lagging.device.run_all()
    assert lagging.device.attended == [60_000] * 2 + [9_000] * 2


def test_a_wrapper_is_used_again_when_its_copy_has_run(lagging):
    for tokens in range(1, 20):
        lagging.prompt(tokens)()
        lagging.device.run_all()
    assert lagging.device.attended == list(range(1, 20)) and lagging.wrapper.made == 1


def test_wrappers_are_bounded_and_plans_right_all_the_same(lagging):
    tokens = list(range(1, 4 * flashinfer_probe.MAX_PLANS))
    for number in tokens:
        lagging.prompt(number)()
    lagging.device.run_all()
    assert lagging.device.attended == tokens
    assert lagging.wrapper.made == flashinfer_probe.MAX_PLANS
    assert lagging.event.waited == len(tokens) - flashinfer_probe.MAX_PLANS


def test_a_plan_that_fails_is_never_attended(lagging, monkeypatch):
    """Its wrapper may have half a plan, whose copy is queued or not."""
    plan = lagging.wrapper.plan

    def fail(*args, **kwargs):
        plan(*args, **kwargs)
        raise RuntimeError("int workspace overflow")

    attend = lagging.prompt(500)
    monkeypatch.setattr(lagging.wrapper, "plan", fail)
    with pytest.raises(RuntimeError):
        attend()
    monkeypatch.setattr(lagging.wrapper, "plan", plan)
    attend()
    lagging.device.run_all()
    assert lagging.device.attended == [500] and lagging.wrapper.made == 2
