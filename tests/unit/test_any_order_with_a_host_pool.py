"""Any order of events with a host pool behind the tree: evictions to it, loads back, loads that are declined.

Copies are really made, of the notes that tell which tokens shaped a slot; so a row that holds what was loaded wrongly
is found by the same checks as any other.
"""

import itertools
from importlib.metadata import version
from typing import ClassVar

import pytest

if version("sglang") == "0.5.17":
    pytest.skip("HiCache is refused there", allow_module_level=True)

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule, run_state_machine_as_test

from tests.conftest import FUZZ_SEED
from tests.unit.machine import Machine
from tests.unit.test_any_order_of_events import Serving

LOADED = {"tokens": 0, "declined": 0}


class ServingWithHostPool(Serving):
    """As SGLang's loop drives HiCache."""

    host: ClassVar[dict] = {"host_ratio": 1.5}

    @initialize(of_loads=st.sampled_from([1, 2, 3]))
    def start(self, of_loads):
        super().start()
        self.decline(of_loads)
        tree = self.machine.tree
        load_back, numbers = tree.load_back, itertools.count()

        def load(*args, **kwargs):
            is_declined = self.declined_of and next(numbers) % self.declined_of == 0
            LOADED["declined"] += bool(is_declined)
            return not is_declined and load_back(*args, **kwargs)

        tree.load_back = load

    @rule(of_loads=st.sampled_from([0, 0, 1, 2]))
    def decline(self, of_loads):
        """From now on one of so many loads is declined, all of them, or none but for SGLang's own reasons."""
        self.declined_of = of_loads

    @precondition(lambda self: self.sent)
    @rule(numbers=st.lists(st.integers(0, 9), min_size=1, max_size=3), turns=st.sampled_from([0, 150]))
    def ask_again_after_a_pause(self, numbers, turns):
        """In which others had the pool."""
        self.steps(12)
        self.evict(1.0)
        for number in numbers:
            self.send_again(number, turns)
        self.steps(6)

    def begin_step(self):
        self.machine.tree.check_hicache_events()

    def load(self, reqs):
        for req in reqs:
            assert req.prefix_len >= req.metasoft.compressed_slots, "a virtual token would be computed"
            LOADED["tokens"] += self.machine.adapter.loaded_len(req)
        self.machine.tree.ready_to_load_host_cache()

    def teardown(self):
        super().teardown()
        tree = self.machine.tree
        tree.reset()
        host = tree.cache_controller.mem_pool_host
        assert host.available_size() == host.size, "slots of the host pool were lost"


QUICK = ((1, None, "write_through"), (16, 256, "write_back"))
CASES = [
    pytest.param(page, chunk, policy, marks=() if (page, chunk, policy) in QUICK else pytest.mark.slow)
    for page in (1, 16)
    for chunk in (None, 256)
    for policy in ("write_through", "write_through_selective", "write_back")
]


@pytest.mark.parametrize(("page", "chunk", "policy"), CASES)
def test_any_order_of_events_with_a_host_pool(page, chunk, policy):
    """With chunks they are compressed as they come, and prompts may be longer than the pool."""
    settings_ = settings(
        derandomize=not FUZZ_SEED, database=None, deadline=None, max_examples=20, stateful_step_count=40,
        phases=(Phase.generate,), suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    attributes = {
        "page": page, "chunk": chunk, "during_prefill": chunk is not None, "keep_raw": policy != "write_back",
        "pool": 1600 if chunk else 4000, "host": {"host_ratio": 1.5, "write_policy": policy},
    }  # fmt: skip
    LOADED.update(tokens=0, declined=0)
    case = type("ServingCase", (ServingWithHostPool,), attributes)
    run_state_machine_as_test(seed(int(FUZZ_SEED))(case) if FUZZ_SEED else case, settings=settings_)
    assert LOADED["tokens"] > 0 and (LOADED["declined"] > 0 or policy == "write_through_selective")


@pytest.mark.parametrize("always", [True, False], ids=["always", "never"])
def test_a_request_whose_load_is_declined_gets_in_by_its_raw_prompt(always):
    LOADED.update(tokens=0, declined=0)
    serving = ServingWithHostPool()
    serving.start(of_loads=0)
    serving.arrive(0, head=900, question=40, first=0, options={}, salt=None, max_new_tokens=2, copies=1)
    serving.steps(5)
    serving.evict(1.0)
    serving.decline(int(always))
    serving.send_again(0, turns=0)
    (req,) = serving.waiting
    serving.steps(1)
    assert (serving.waiting == [req]) == always  # nothing was committed
    serving.steps(9)
    assert not serving.waiting and not serving.running
    assert (req.metasoft.reused_prefix is None) == always and req.metasoft.compressed is not None
    assert (LOADED["declined"], LOADED["tokens"] > 900 // 4) == (int(always), not always)
    serving.teardown()


@pytest.mark.parametrize("keep_raw", [True, False])
def test_a_chat_that_grows_by_segments_is_copied_when_its_prefix_is_hit_again(keep_raw):
    """Of each turn a raw twin comes first, below the prefix: that is no hit, and takes none from what follows."""
    machine = Machine(
        8000, keep_raw=keep_raw, min_tokens=100, window=16, host_ratio=2, write_policy="write_through_selective"
    )
    host = machine.tree.cache_controller.mem_pool_host
    ids, slots, copied = list(range(10, 610)), [], []
    for turn in range(3):
        req = machine.arrive(ids)
        machine.prefill(req)
        slots.append(req.metasoft.compressed_slots)
        machine.finish(req)
        machine.tree.check_hicache_events()
        copied.append(host.size - host.available_size())
        ids = ids + list(range(1000 * (turn + 1), 1000 * (turn + 1) + 300))
    assert slots[0] < slots[1] < slots[2]
    assert copied == [0, slots[0], slots[1]]
