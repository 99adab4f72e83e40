"""A scheduler's memory without a model: SGLang's requests, radix tree, allocator and rows, with our compressor on them.

Only the arithmetic on keys and values is left out. In its place every slot of the pool notes which tokens shaped what
it holds, so that it can be checked at any time that a request's row holds nothing that its own tokens do not explain.
"""

import functools
from array import array
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from metasoft_patches.adapter import load_adapter
from metasoft_patches.cache.commit import Committer
from metasoft_patches.cache.namespaces import Namespaces
from metasoft_patches.cache.radix import make_factory
from metasoft_patches.cache.request import RequestState
from metasoft_patches.cpu.host_pool import allow_host_pool
from metasoft_patches.forward.runner import ProbeRunner
from metasoft_patches.scheduler.compressor import SchedulerCompressor
from metasoft_patches.scheduler.fence import LaunchFence
from metasoft_patches.scheduler.hooks import SchedulerHooks
from metasoft_patches.scheduler.matching import PrefixMatcher
from metasoft_patches.scheduler.ranks import Ranks
from sglang.srt.managers.schedule_batch import FINISH_LENGTH, Req
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.common import checkpoint_kv_cache, evict_from_tree_cache, release_kv_cache
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
from sglang.srt.runtime_context import publish
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs

from sglang_metasoft.config import MetaSoftConfig


class NotingStages(ProbeRunner):
    """Writes into new slots which tokens shaped them, by the jobs of the real stages."""

    def __init__(self, machine: "Machine") -> None:
        self.machine, self.adapter, self.committer = machine, machine.adapter, machine.compressor.committer
        self.has_probe, self.shape = False, SimpleNamespace(hidden_size=1)
        self.is_stale, self.unfit, self.device = False, None, torch.device("cpu")
        self.num_probes = 0

    def run(self, items):
        for req, plan, slots in items:
            job = self._make_job(req, plan, slots)
            seen = self.machine.explain(req, job.context_slots, job.probe.first_position)
            self.machine.notes.update(dict.fromkeys(slots.tolist(), seen))
            self.num_probes += 1
        return [True] * len(items)


class Compressor(SchedulerCompressor):
    """Ours, on a scheduler without a model."""

    def __init__(self, scheduler, config, adapter) -> None:
        self.scheduler, self.config, self.adapter = scheduler, config, adapter
        self.committer = Committer(scheduler.tree_cache, adapter)
        self.page_size, self.metrics, self.namespaces = scheduler.page_size, None, Namespaces(adapter, "")
        self.matcher = PrefixMatcher(config, adapter, scheduler.tree_cache, self.namespaces)
        self.sliding_window_tokens = None
        self.ranks, self.fence = Ranks.__new__(Ranks), LaunchFence(scheduler)
        self.ranks.size = 1
        self.fidelity = SimpleNamespace(wants=lambda rid: False)  # there is no model to ask


class PoolNotes:
    """Notes that lie in a KV pool, and so go wherever its entries are copied."""

    def __init__(self, pool: MHATokenToKVPool) -> None:
        allow_host_pool()
        self.numbers = pool.k_buffer[0].view(-1).numpy()
        self.all: list[array] = []

    def __setitem__(self, slot: int, note: array) -> None:
        self.numbers[slot] = len(self.all)
        self.all.append(note)

    def __getitem__(self, slot: int) -> array:
        return self.all[int(self.numbers[slot])]

    def update(self, notes: dict[int, array]) -> None:
        for slot, note in notes.items():
            self[slot] = note


class Machine:
    """One scheduler.

    Args:
        slots: of the KV pool.
        page: slots of a page.
        chunk: prefill tokens of one forward; None prefills a prompt at once.
        eviction_policy: the operator's.
        host_ratio: slots of a host pool for each of the KV pool; 0 for none.
        write_policy: of that host pool.
        settings: of :class:`MetaSoftConfig`.
    """

    def __init__(
        self,
        slots: int,
        page: int = 1,
        chunk: int | None = None,
        eviction_policy: str = "lru",
        host_ratio: float = 0,
        write_policy: str = "write_through",
        **settings,
    ) -> None:
        host = {"enable_hierarchical_cache": True, "hicache_ratio": host_ratio, "hicache_write_policy": write_policy}
        server_args = ServerArgs(model_path="none", device="cpu", page_size=page, **(host if host_ratio else {}))
        publish(server_args, role="test")
        self.config = MetaSoftConfig(secret="00" * 16, **settings)
        self.adapter, self.page, self.chunk = load_adapter(), page, chunk
        self.notes: Any = {}  # slot: the prompt, up to the last token that shaped what it holds
        pool: Any = SimpleNamespace(device="cpu")
        if host_ratio:
            pool = MHATokenToKVPool(slots, page, torch.float32, 1, 1, 1, "cpu", False)
            self.notes = PoolNotes(pool)
        allocator = TokenToKVPoolAllocator if page == 1 else PagedTokenToKVPoolAllocator
        sizes = (slots,) if page == 1 else (slots, page)
        self.allocator = allocator(*sizes, torch.float32, "cpu", pool, False)
        self.rows = ReqToTokenPool(8, 16384, "cpu", False)
        params = CacheInitParams(False, self.rows, self.allocator, page, eviction_policy=eviction_policy)
        context = SimpleNamespace(
            server_args=server_args, params=params, is_hybrid_swa=False, is_hybrid_ssm=False,
            enable_hierarchical_cache=bool(host_ratio),
            tp_worker=SimpleNamespace(register_hicache_layer_transfer_counter=lambda counter: None),
        )  # fmt: skip
        self.tree = make_factory(self.config, self.adapter)(context)
        self.running = SimpleNamespace(batch_is_full=True)
        self.scheduler = SimpleNamespace(
            tree_cache=self.tree, page_size=page, enable_overlap=False, running_batch=self.running
        )
        self.compressor = Compressor(self.scheduler, self.config, self.adapter)
        self.compressor.stages = NotingStages(self)
        self.hooks = SchedulerHooks(self.config, self.adapter)
        self.hooks.compressor = self.compressor
        self.slots, self.requests = slots, 0

    # -- a request's life --------------------------------------------------------------------------------------

    def arrive(self, ids, *, salt: str | None = None, max_new_tokens: int = 8, **options) -> Req:
        """A request with a prompt of these ids."""
        self.requests += 1
        params = SamplingParams(max_new_tokens=max_new_tokens)
        req = Req(f"r{self.requests}", "", array("q", ids), params, cache_salt=salt, vocab_size=1 << 20)
        req.metasoft = RequestState(req, options)
        return req

    def match(self, req: Req, match_prefix=None) -> None:
        """Look for its prefix in the tree, as a scheduling attempt does."""
        match_prefix = match_prefix or self.match_prefix
        original = Req._compute_max_prefix_len

        def capped(req, input_len):
            limit = original(req, input_len)
            capped = self.hooks.cap_prefix(limit, req, input_len)
            return limit if capped is None else capped

        with patch.object(Req, "_compute_max_prefix_len", capped):
            match_prefix(Req.init_next_round_input, req, self.tree)

    def match_prefix(self, original, req: Req, tree) -> None:
        """As the hook does, in a pool that has room."""
        self.compressor.matcher.match(functools.partial(original, req, tree), req, has_room=lambda req: True)

    def prefill(self, *reqs: Req) -> None:
        """Match and prefill the requests in one batch, or chunk by chunk."""
        for req in reqs:
            self.match(req)
            req.metasoft.reused_tokens = req.metasoft.compressed.tokens if req.metasoft.compressed else 0
            req.lock = self.tree.lock(req.last_node)
            found = self.tree.path_device_indices(req.last_node)[: req.prefix_len]
            self.rows.alloc([req])
            self.rows.write((req.kv.req_pool_idx, slice(0, req.prefix_len)), found.to(torch.int32))
            self.check_row(req, req.prefix_len)
        waiting = list(reqs)
        while waiting:
            self.forward(waiting, [self.next_end(req) for req in waiting])
            waiting = [req for req in waiting if req.extend_end < len(req.full_untruncated_fill_ids)]

    def next_end(self, req: Req) -> int:
        """Where its next chunk ends."""
        end = len(req.full_untruncated_fill_ids)
        return min(end, req.prefix_len + self.chunk) if self.chunk else end

    def forward(self, reqs: list[Req], ends: list[int]) -> None:
        """Extend each request, compress, publish."""
        for req, end in zip(reqs, ends, strict=True):
            self.extend(req, end)
        lengths = torch.tensor([req.extend_end for req in reqs])
        batch = SimpleNamespace(reqs=reqs, decoding_reqs=None, beam_tail=None, seq_lens=lengths, seq_lens_cpu=lengths)
        self.compressor.compress_finished(batch)
        assert batch.seq_lens.tolist() == batch.seq_lens_cpu.tolist() == [req.extend_end for req in reqs]
        for req in reqs:
            checkpoint_kv_cache(req, self.tree)
            self.check_row(req, req.extend_end)

    def extend(self, req: Req, end: int) -> None:
        """Compute the row up to ``end``."""
        start = req.prefix_len
        assert start % self.page == 0 or start == req.kv.kv_allocated_len
        slots = self.take_slots(req, start, end)
        row = self.compressor.committer.row(req)
        row[start:end] = slots.to(torch.int32)
        before = self.explain(req, row[:start], start + req.metasoft.offset)
        ids = self.ids(req)
        for index, slot in enumerate(slots.tolist(), start):
            self.notes[slot] = ids[: max(len(before), index + 1 + req.metasoft.offset)]
        req.extend_end = end
        req.kv.kv_allocated_len = req.kv.kv_committed_len = end

    def take_slots(self, req: Req, start: int, end: int) -> torch.Tensor:
        """Slots for ``[start, end)`` of a row: the rest of its last page, and new pages."""
        rest = min(-start % self.page, end - start)
        last = int(self.compressor.committer.row(req)[start - 1]) if rest else 0
        new = -(-(end - start - rest) // self.page) * self.page
        evict_from_tree_cache(self.tree, new)
        pages = self.allocator.alloc(new) if new else torch.empty(0, dtype=torch.int64)
        assert pages is not None, "out of memory"
        return torch.cat([torch.arange(last + 1, last + 1 + rest), pages[: end - start - rest]])

    def decode(self, req: Req, output_ids) -> None:
        """Give the request its next outputs; the last one's KV is never computed."""
        for token in output_ids:
            if req.extend_end < len(req.full_untruncated_fill_ids):
                self.extend(req, req.extend_end + 1)
                req.prefix_len = req.extend_end
            req.output_ids.append(token)
            req.refresh_fill_ids()

    def finish(self, req: Req) -> None:
        """The request ends; the tree keeps what it can."""
        req.finished_reason = FINISH_LENGTH(len(req.output_ids))
        release_kv_cache(req, self.tree, checkpoint=True)

    def retract(self, req: Req) -> None:
        """The request gives all back and will start again."""
        release_kv_cache(req, self.tree, checkpoint=False)
        req.reset_for_retract()
        self.hooks.request_retracted(None, req)

    # -- what must hold ----------------------------------------------------------------------------------------

    def ids(self, req: Req) -> array:
        """Prompt and outputs."""
        return req.metasoft.prompt_ids + req.output_ids

    def explain(self, req: Req, slots: torch.Tensor, tokens: int) -> array:
        """The first tokens of a request that shape something which sees ``tokens`` of it by way of these slots."""
        longest = max((self.notes[slot] for slot in slots.tolist()), key=len, default=array("q"))
        return self.ids(req)[: max(tokens, len(longest))]

    def check_row(self, req: Req, end: int) -> None:
        """Everything in the row follows from tokens that the request has, and from nothing else."""
        ids, row = self.ids(req), self.compressor.committer.row(req)[:end].tolist()
        assert len(set(row)) == end
        for note in {id(self.notes[slot]): self.notes[slot] for slot in row}.values():
            assert len(note) <= len(ids) and _equal(note, ids[: len(note)]), "shaped by tokens not of this prompt"

    def check_idle(self) -> None:
        """Nothing is lost, nothing is locked; prefixes that are in the tree hold what their length says."""
        assert self.allocator.available_size() + self.tree.evictable_size() == self.slots
        assert self.tree.protected_size() == 0
        assert len(self.rows.free_slots) == self.rows.size


def _equal(a: array, b: array) -> bool:
    return np.array_equal(np.frombuffer(a, dtype=np.int64), np.frombuffer(b, dtype=np.int64))
