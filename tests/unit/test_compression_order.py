"""What a compression does on host and streams, in which order, when all goes well and when a stage fails."""

import contextlib
from array import array
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("sglang")
from metasoft_patches.scheduler import compressor as module
from metasoft_patches.scheduler.compressor import Chosen, SchedulerCompressor
from metasoft_patches.scheduler.fence import LaunchFence
from metasoft_patches.scheduler.ranks import Guard, InStepFault, Outcome

from sglang_metasoft.types import Bypass, Plan

PLAN = Plan(0, 8, 2, 0)


class Recorded:
    """Two streams and the steps of a compression that write down their names."""

    def __init__(self, monkeypatch, fails=(), sizes=1, no_room=()):
        self.steps, self.fails, self.no_room = [], dict(fails), no_room
        self.scheduler = SimpleNamespace(
            enable_overlap=True,
            schedule_stream=SimpleNamespace(wait_stream=lambda other: self.steps.append("schedule waits")),
            forward_stream=SimpleNamespace(wait_stream=lambda other: self.steps.append(f"forward waits for {other}")),
            forward_stream_ctx=contextlib.nullcontext(),
            batch_record_buf=[None, []],
            batch_record_ct=1,
            running_batch=SimpleNamespace(),
            device_module=SimpleNamespace(
                Event=lambda: SimpleNamespace(record=lambda: self.steps.append("event")), current_stream=lambda: "own"
            ),
        )
        compressor = self.compressor = SchedulerCompressor.__new__(SchedulerCompressor)
        compressor.scheduler, compressor.metrics = self.scheduler, None
        compressor.adapter = SimpleNamespace(request_of_rows=lambda batch: torch.arange(len(batch.reqs)))
        compressor.ranks = SimpleNamespace(size=sizes, agree=self.agree)
        compressor.fence = LaunchFence(self.scheduler)
        compressor.fidelity = SimpleNamespace(wants=lambda rid: rid in self.sampled, compare=self.compare)
        compressor.committer = SimpleNamespace(reserve=self.reserve, release=lambda slots: self.note("release"))
        compressor.stages = SimpleNamespace(
            failed_stage="score",
            run=self.run,
            device=torch.device("cpu"),
            is_stale=False,
            unfit=None,
            follow_weights=self.follow_weights,
        )
        monkeypatch.setattr(module.SchedulerCompressor, "_commit", lambda *args: self.note("commit"))
        monkeypatch.setattr(module.SchedulerCompressor, "_is_last_chunk", lambda *args: True)
        self.agreed, self.sampled = None, set()

    def note(self, name: str, result=None):
        self.steps.append(name)
        if name in self.fails:
            raise self.fails[name]
        return result

    def follow_weights(self):
        self.note("follow weights")
        self.compressor.stages.is_stale = False

    def reserve(self, num_slots):
        self.reserved = getattr(self, "reserved", 0) + 1
        return self.note("reserve", None if self.reserved in self.no_room else torch.arange(num_slots))

    def run(self, items):
        self.into = [slots for *_, slots in items]
        return self.note("stages", [True] * len(items))

    def agree(self, outcomes):
        self.own = outcomes
        return self.note("agree", outcomes if self.agreed is None else self.agreed)

    def compare(self, spans):
        self.compared = [req.rid for req, _, _ in spans]
        return self.note("compare")

    def compress(self, requests=1) -> list:
        reqs = [SimpleNamespace(rid=str(n), metasoft=SimpleNamespace()) for n in range(requests)]
        self.skipped = {}
        for req in reqs:
            req.metasoft.set_bypass = lambda reason, lifetime, rid=req.rid: self.skipped.__setitem__(rid, reason)
        lens = torch.full((requests,), 10)
        batch = SimpleNamespace(reqs=reqs, seq_lens=lens, seq_lens_cpu=lens.clone(), seq_lens_sum=10 * requests)
        self.compressor._compress(batch, [Chosen(n, req, PLAN) for n, req in enumerate(reqs)])
        return batch.seq_lens.tolist()


QUEUED = ["schedule waits", "reserve", "forward waits for own", "stages", "event", "schedule waits"]


def test_what_is_queued_outlives_the_forward(monkeypatch):
    recorded = Recorded(monkeypatch)
    assert recorded.compress() == [10 - PLAN.saved_slots]
    assert recorded.steps == [*QUEUED, "agree", "commit"]
    assert recorded.scheduler.batch_record_buf[1] == [recorded.into]


@pytest.mark.parametrize("fails", [{}, {"compare": RuntimeError("no logits")}])
def test_fidelity_is_sampled_before_the_raw_entries_are_let_go_and_its_faults_cost_nothing(monkeypatch, fails):
    recorded = Recorded(monkeypatch, fails=fails)
    recorded.sampled = {"1"}
    assert recorded.compress(2) == [10 - PLAN.saved_slots] * 2 and recorded.compared == ["1"]
    assert recorded.steps[-6:] == ["forward waits for own", "compare", "event", "schedule waits", "commit", "commit"]


def test_a_fault_of_fidelity_on_one_of_several_ranks_ends_the_server(monkeypatch):
    recorded = Recorded(monkeypatch, fails={"compare": RuntimeError("no logits")}, sizes=2)
    recorded.sampled = {"0"}
    with pytest.raises(RuntimeError, match="no logits"):
        recorded.compress()


def test_so_it_does_after_a_fault(monkeypatch):
    """Kernels of the layers before it are queued and read the slots; what reuses those comes after them."""
    recorded = Recorded(monkeypatch, fails={"stages": RuntimeError("layer 7")})
    assert recorded.compress() == [10] and recorded.skipped == {"0": Bypass.FAULT}
    assert recorded.steps == [*QUEUED, "agree", "release"]
    assert recorded.scheduler.batch_record_buf[1] == [recorded.into]


def test_a_reservation_that_fails_concerns_one_request(monkeypatch):
    recorded = Recorded(monkeypatch, no_room=(2,))
    assert recorded.compress(3) == [4, 10, 4] and recorded.skipped == {"1": Bypass.NO_FREE_SLOTS}
    recorded = Recorded(monkeypatch, fails={"reserve": RuntimeError("torn tree")})
    assert recorded.compress() == [10] and recorded.skipped == {"0": Bypass.FAULT}


def test_updated_weights_are_followed_once_before_anything_is_reserved(monkeypatch):
    recorded = Recorded(monkeypatch)
    recorded.compressor.stages.is_stale = True
    recorded.compress()
    assert recorded.steps == [
        "schedule waits",
        "forward waits for own",
        "follow weights",
        "event",
        *QUEUED[1:],
        "agree",
        "commit",
    ]
    recorded.steps.clear()
    recorded.compress()
    assert "follow weights" not in recorded.steps


def test_weights_that_do_not_fit_reserve_nothing(monkeypatch):
    recorded = Recorded(monkeypatch)
    recorded.compressor.stages.unfit = "other embeddings"
    assert recorded.compress(2) == [10, 10] and recorded.skipped == dict.fromkeys("01", Bypass.WEIGHTS)
    assert recorded.steps == ["schedule waits"]


def test_a_fault_while_following_is_tried_again(monkeypatch):
    recorded = Recorded(monkeypatch, fails={"follow weights": RuntimeError("out of memory")})
    recorded.compressor.stages.is_stale = True
    assert recorded.compress() == [10] and recorded.skipped == {"0": Bypass.FAULT}
    recorded.fails.clear()
    assert recorded.compress() == [4]
    recorded = Recorded(monkeypatch, sizes=2, fails={"follow weights": RuntimeError("out of memory")})
    recorded.compressor.stages.is_stale = True
    with pytest.raises(RuntimeError, match="out of memory"):
        recorded.compress()


# -- several ranks -------------------------------------------------------------------------------------------------


def test_a_rank_without_room_takes_part(monkeypatch):
    recorded = Recorded(monkeypatch, sizes=2, no_room=(1,))
    recorded.compress(2)
    assert [slots.tolist() for slots in recorded.into] == [[0, 0], [0, 1]]
    assert recorded.own == [Outcome.NO_FREE_SLOTS, Outcome.SOUND]
    assert recorded.skipped == {"0": Bypass.NO_FREE_SLOTS} and recorded.steps.count("release") == 0


def test_what_another_rank_could_not_do_is_not_committed_here(monkeypatch):
    recorded = Recorded(monkeypatch, sizes=2)
    recorded.agreed = [Outcome.SOUND, Outcome.NOT_FINITE, Outcome.NO_FREE_SLOTS]
    assert recorded.compress(3) == [4, 10, 10] and recorded.own == [Outcome.SOUND] * 3
    assert recorded.skipped == {"1": Bypass.FAULT, "2": Bypass.NO_FREE_SLOTS}
    assert recorded.steps[-3:] == ["commit", "release", "release"]


def test_a_fault_in_step_is_agreed_upon_and_any_other_ends_the_server(monkeypatch):
    recorded = Recorded(monkeypatch, sizes=2, fails={"stages": InStepFault()})
    recorded.fails["stages"].__cause__ = RuntimeError("layer 7")
    assert recorded.compress() == [10] and recorded.own == [Outcome.FAULT]
    recorded = Recorded(monkeypatch, sizes=2, fails={"stages": RuntimeError("in an all-reduce")})
    with pytest.raises(RuntimeError, match="all-reduce"):
        recorded.compress()
    assert "agree" not in recorded.steps


def test_the_guard_remembers_the_first_fault_where_others_wait():
    guard = Guard(is_shared=True)
    guard.check()
    for message in ("first", "second"):
        with guard():
            raise ValueError(message)
    with pytest.raises(InStepFault) as error:
        guard.check()
    assert str(error.value.__cause__) == "first"
    with pytest.raises(ValueError), Guard(is_shared=False)():
        raise ValueError


# -- SGLang's own plans --------------------------------------------------------------------------------------------


class Stream:
    """Runs what is queued when somebody waits for it."""

    def __init__(self):
        self.queue = []

    def make_event(self):
        event = SimpleNamespace(passed=False)
        event.record = lambda: self.queue.append(lambda: setattr(event, "passed", True))

        def synchronize():
            while not event.passed:
                self.queue.pop(0)()

        event.synchronize = synchronize
        return event


@pytest.mark.parametrize("compressed", [(), (0,), (0, 1, 2), (1, 4)])
def test_a_plan_is_copied_before_the_next_one_is_written(compressed):
    """SGLang's overlap loop with a wrapper's one page-locked buffer. A stream that was waited for runs on by the start
    of the next batch, as a device does while the host prepares a batch."""
    stream, ran = Stream(), array("q")
    page_locked = [None]
    forward = SimpleNamespace(wait_stream=lambda other: None)
    fence = LaunchFence(SimpleNamespace(
        enable_overlap=True, forward_stream=forward, forward_stream_ctx=contextlib.nullcontext(),
        device_module=SimpleNamespace(Event=stream.make_event, current_stream=lambda: None),
    ))  # fmt: skip
    results = []
    for number in range(6):
        fence.batch_launches()
        if stream.queue:
            stream.queue.pop(0)()  # the next batch's copy
        page_locked[0] = number
        on_device = []
        stream.queue.append(lambda copied=on_device: copied.append(page_locked[0]))
        stream.queue.append(lambda copied=on_device: ran.append(copied[0]))
        results.append(stream.make_event())
        results[-1].record()
        if number in compressed:
            with fence.compression():
                stream.queue.append(lambda: None)
        if number:
            results[number - 1].synchronize()
    results[-1].synchronize()
    assert list(ran) == list(range(6))
