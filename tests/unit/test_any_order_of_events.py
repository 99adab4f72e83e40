"""Any order of arrivals, steps, retractions, aborts, evictions and weight updates, with SGLang's own admission.

What is compared with is slow and knows nothing of prefixes: which tokens shaped each slot (``machine``), a list of all
prefixes that were ever indexed, and sums over the rows of all running requests.
"""

from types import SimpleNamespace
from typing import ClassVar
from unittest.mock import patch

import pytest

pytest.importorskip("sglang.srt.mem_cache.allocator.token")
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from metasoft_patches.scheduler.admission import Admission
from metasoft_patches.scheduler.chunked_prefill import ChunkedPrefillGuard
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.schedule_policy import AddReqResult, PrefillAdder

from tests.conftest import FUZZ_SEED
from tests.unit.machine import Machine

WINDOW, CONTEXT = 16, 6000
DOCUMENTS = [[(7 * n + i * (n + 3)) % 97 for i in range(2000)] for n in range(3)]
OPTIONS = [{}, {}, {}, {"ratio": 2}, {"ratio": 1}, {"budget": 150}, {"boundary": 600}, {"budget": 60, "boundary": 900}]


class Running(list):
    """The requests that decode, as SGLang's batch of them answers."""

    batch_is_full = False

    @property
    def reqs(self):
        return self

    def is_empty(self):
        return not self

    def check_decode_mem(self):
        return True


class Serving(RuleBasedStateMachine):
    """One scheduler, driven as SGLang's loop drives it."""

    page, chunk, during_prefill, keep_raw, pool = 1, None, False, True, 4800
    host: ClassVar[dict] = {}  # what a machine with a host pool is told of it

    @initialize()
    def start(self):
        self.machine = Machine(
            self.pool, self.page, self.chunk, keep_raw=self.keep_raw, during_prefill=self.during_prefill,
            min_tokens=100, window=WINDOW, index_tokens=8000, **self.host,
        )  # fmt: skip
        scheduler, hooks = self.machine.scheduler, self.machine.hooks
        scheduler.running_batch = self.running = Running()
        scheduler.chunked_prefill_size, scheduler.max_total_num_tokens = self.chunk, self.pool
        scheduler.max_req_input_len, scheduler.model_config = self.pool, SimpleNamespace(context_len=CONTEXT)
        hooks.admission = Admission(scheduler, hooks.config, hooks.adapter)
        hooks.prefill_guard = ChunkedPrefillGuard(scheduler, hooks.adapter)
        self.waiting, self.chunked, self.indexed, self.sent = [], None, [], []
        index = self.machine.tree.prefixes
        add = index.add

        def noting(tenant, namespace, prefix, ids):
            self.indexed.append((prefix, namespace, ids[: prefix.required_tokens]))
            return add(tenant, namespace, prefix, ids)

        index.add = noting

    # -- what may happen -----------------------------------------------------------------------------------------

    @rule(
        document=st.integers(0, 2), head=st.sampled_from([300, 900, 2000]), question=st.integers(1, 400),
        first=st.integers(0, 3), options=st.sampled_from(OPTIONS), salt=st.sampled_from([None, None, "b"]),
        max_new_tokens=st.sampled_from([0, 1, 12, 300]), copies=st.sampled_from([1, 1, 4]),
    )  # fmt: skip
    def arrive(self, document, head, question, first, options, salt, max_new_tokens, copies):
        ids = DOCUMENTS[document][:head] + [first] + [first + i % 5 for i in range(question - 1)]
        options = {name: value for name, value in options.items() if name != "boundary" or value < len(ids)}
        self.sent.append((ids, {"salt": salt, "max_new_tokens": max_new_tokens, **options}))
        self.send(ids, self.sent[-1][1], copies)

    def send(self, ids, fields, copies=1):
        """What fits the pool neither raw nor compressed is refused on arrival."""
        admission = self.machine.hooks.admission
        for _ in range(copies):
            req = self.machine.arrive(ids, **fields)
            if len(ids) + 400 < self.pool or self.during_prefill and admission._fits(admission._footprint(req)):
                self.waiting.append(req)

    @precondition(lambda self: self.sent)
    @rule(number=st.integers(0, 9), turns=st.sampled_from([0, 0, 150]))
    def send_again(self, number, turns):
        """A repeat, or the next turn of a chat."""
        ids, fields = self.sent[number % len(self.sent)]
        ids = ids + [5] * turns
        if len(ids) < 3000:
            self.sent.append((ids, fields))
            self.send(ids, fields)

    @rule(times=st.integers(1, 9))
    def steps(self, times):
        for _ in range(times):
            self.step()

    def step(self):
        """One iteration of the scheduler: a prefill batch if anything can be let in, else all decode a token."""
        machine, hooks = self.machine, self.machine.hooks
        self.begin_step()
        adder = PrefillAdder(self.page, machine.tree, machine.allocator, self.running, 1.0, 16384, self.chunk)
        reserve = PrefillAdder._request_slot_reserve_for_req

        def reserving(adder, req, *, extend_input_len=None):
            return reserve(adder, req, extend_input_len=extend_input_len) + hooks.extra_slots(
                req, extend_input_len is None
            )

        with patch.object(PrefillAdder, "_request_slot_reserve_for_req", reserving):
            if self.chunked is not None:
                self.chunked = hooks.add_chunk(PrefillAdder.add_chunked_req, adder, (req := self.chunked))
                assert req in adder.can_run_list, "let in without room for its next chunk"
            for req in list(self.waiting):
                if len(self.running) + len(adder.can_run_list) >= machine.rows.size - 1:
                    break
                self.match(req)
                verdict = adder.add_one_req(req, has_chunked_req=self.chunked is not None, truncation_align_size=None)
                if verdict is not AddReqResult.CONTINUE:
                    break
        reqs = adder.can_run_list
        self.waiting = [req for req in self.waiting if req not in reqs]
        self.chunked = adder.new_chunked_req or self.chunked
        if not reqs:
            self.decode()
            return
        self.load(reqs)
        machine.rows.alloc(reqs)
        for req in reqs:
            if req.kv.kv_allocated_len == 0:
                prefix = machine.tree.path_device_indices(req.last_node)[: req.prefix_len]
                machine.rows.write(
                    (req.kv.req_pool_idx, slice(0, req.prefix_len)), prefix.to(machine.rows.req_to_token.dtype)
                )
        lent = machine.compressor.committer.reserve
        with patch.object(machine.compressor.committer, "reserve", lambda slots: self.never_none(lent(slots))):
            machine.forward(reqs, [req.extend_end for req in reqs])
        for req in reqs:
            if req is not self.chunked:
                machine.decode(req, [3])
                self.running.append(req) if req.sampling_params.max_new_tokens > 1 else machine.finish(req)

    def begin_step(self):
        """What comes first in SGLang's loop."""

    def load(self, reqs):
        """Between the admission of requests and their forward."""

    def decode(self):
        for req in list(self.running):
            self.machine.decode(req, [len(req.output_ids) % 5])
            if len(req.output_ids) >= req.sampling_params.max_new_tokens:
                self.finish(req)

    @precondition(lambda self: self.running)
    @rule(number=st.integers(0, 7))
    def finish_early(self, number):
        self.finish(self.running[number % len(self.running)])

    @precondition(lambda self: self.running)
    @rule(number=st.integers(0, 7))
    def retract(self, number):
        req = self.running.pop(number % len(self.running))
        self.machine.retract(req)
        self.waiting.insert(0, req)

    @precondition(lambda self: self.waiting)
    @rule(number=st.integers(0, 7))
    def abort_a_waiting_one(self, number):
        self.waiting.pop(number % len(self.waiting))

    @rule(share=st.sampled_from([0.3, 1.0]))
    def evict(self, share):
        from sglang.srt.mem_cache.base_prefix_cache import EvictParams

        self.begin_step()
        self.machine.tree.evict(EvictParams(num_tokens=int(self.machine.tree.evictable_size() * share)))

    @rule()
    def update_weights(self):
        self.machine.compressor.namespaces.generation += 1
        self.machine.tree.prefixes.clear()

    # -- what must hold ------------------------------------------------------------------------------------------

    def never_none(self, slots):
        assert slots is not None, "let in without room for its consolidated entries"
        return slots

    def match(self, req: Req) -> None:
        self.machine.match(req, self.machine.hooks.match_prefix)
        state = req.metasoft
        ids, prefix = self.machine.ids(req), state.compressed
        assert req.prefix_len + state.offset < len(ids)
        if prefix is None:
            assert req.origin_input_ids is state.prompt_ids
            return
        found = req.prefix_len + self.machine.adapter.host_len(req)
        assert found >= prefix.slots, "a prefix that the tree does not hold was named"
        namespace = self.machine.compressor.namespaces.namespace(req)
        required = next(ids for known, owner, ids in self.indexed if known is prefix and owner == namespace)
        assert ids[: len(required)] == required
        assert req.origin_input_ids == prefix.virtual_ids + state.prompt_ids[prefix.tokens :]

    def finish(self, req):
        self.running.remove(req)
        self.machine.finish(req)

    @invariant()
    def slots_and_locks_add_up(self):
        if not hasattr(self, "machine"):
            return
        machine, tree = self.machine, self.machine.tree
        holders = [*self.running, *([self.chunked] if self.chunked else [])]
        locked, owned = set(), 0
        for req in holders:
            row = machine.compressor.committer.row(req)
            locked.update(row[: req.kv.cache_protected_len].tolist())
            owned += -(-req.kv.kv_allocated_len // self.page) * self.page - req.kv.cache_protected_len
            state = req.metasoft
            computed = len(state.prompt_ids) + max(len(req.output_ids) - 1, 0)
            if req is not self.chunked:
                assert req.kv.kv_allocated_len + state.offset == computed
                assert state.report()["metasoft_kv_tokens"] + state.offset == len(state.prompt_ids)
            machine.check_row(req, req.kv.kv_allocated_len)
        # A request may hold its lock for longer than it holds the node's slots: until it publishes again.
        assert tree.protected_size() >= len(locked)
        assert machine.allocator.available_size() + tree.evictable_size() + tree.protected_size() + owned == self.pool
        assert tree.prefixes.num_tokens <= 8000

    def teardown(self):
        if not hasattr(self, "machine"):
            return
        most = 400 * (1 + len(self.waiting) + len(self.running))  # of one alone: its chunks, and up to 300 outputs
        for _ in range(most):
            if not (self.waiting or self.running or self.chunked):
                break
            self.step()
        assert not (self.waiting or self.running or self.chunked), "a request never gets in"
        self.begin_step()
        self.machine.check_idle()


@pytest.mark.parametrize("keep_raw", [True, False], ids=["keep-raw", "free-raw"])
@pytest.mark.parametrize(("chunk", "during_prefill"), [(None, False), (256, False), (256, True)])
@pytest.mark.parametrize("page", [1, 16])
def test_any_order_of_events(page, chunk, during_prefill, keep_raw):
    settings_ = settings(
        derandomize=not FUZZ_SEED, database=None, deadline=None, max_examples=8, stateful_step_count=40,
        phases=(Phase.generate,), suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    # Prompts of up to 3,000 tokens: compressed chunk by chunk they may be longer than the pool.
    attributes = {
        "page": page, "chunk": chunk, "during_prefill": during_prefill, "keep_raw": keep_raw,
        "pool": 1600 if during_prefill else 4800,
    }  # fmt: skip
    case = type("ServingCase", (Serving,), attributes)
    run_state_machine_as_test(seed(int(FUZZ_SEED))(case) if FUZZ_SEED else case, settings=settings_)
