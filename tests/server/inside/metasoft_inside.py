"""A plugin for tests: injects faults into the compression, and checks tree, pool and prefixes whenever a server idles.

``tests/server/inside`` on ``PYTHONPATH`` loads it; ``METASOFT_INSIDE`` holds JSON: a ``seed``, and for each stage of
``STAGES`` the probability that it fails. A request whose id starts with ``inside-<stage>`` fails there for certain;
with ``-rank<n>`` behind it, on that tensor-parallel rank alone. ``own_secrets``: each rank draws a secret of its own.
"decline" is SGLang's load from the host pool, which it may decline at any time. ``returned`` in a check's line counts
prefixes that came back from there; their entries are compared with those that were committed.
One whose id starts with ``inside-corrupt`` spoils an entry of its prefix, which the next check must notice; to one
whose id starts with ``inside-window`` the tree seems to own all of its row.
Each check writes one line, ``metasoft inside: ok ...`` or ``metasoft inside: BROKEN ...``, to the server's log.
"""

import dataclasses
import hashlib
import json
import logging
import os
import random
import re
import secrets

import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

STAGES = ("probe", "reserve", "job", "nan", "layer", "write", "decline")
CHECKED_LAYERS = 3

logger = logging.getLogger("metasoft_inside")


def register() -> None:
    """Called by SGLang in every process."""
    for path, hook in (
        ("configure_scheduler_process", install),
        ("Scheduler.on_idle", lambda result, scheduler: check_when_idle(scheduler)),
    ):
        HookRegistry.register(f"sglang.srt.managers.scheduler.{path}", hook, HookType.AFTER)
    # Applied before the product's hook of the same function, on which every position after a prefix depends.
    path = "sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new"
    HookRegistry.register(path, lambda original, *args, **kwargs: original(*args, **kwargs), HookType.AROUND)


def install(result, *args, **kwargs) -> None:
    """AFTER ``configure_scheduler_process``: only here may the product's modules be imported."""
    import metasoft_patches.forward.runner as stages
    import metasoft_patches.scheduler.compressor as compressor
    import metasoft_patches.scheduler.hooks as scheduler
    from metasoft_patches.adapter import load_adapter
    from metasoft_patches.cache.prefix_index import PrefixIndex
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    import sglang_metasoft.pipeline.batch as batch

    settings = json.loads(os.environ.get("METASOFT_INSIDE", "{}"))
    faults = Faults(settings)
    # In SGLang 0.5.17 it is refused.
    host_pool = {"load_back": faults.load_back} if hasattr(UnifiedRadixCache, "flush_pending_backups") else {}
    if settings.get("own_secrets"):
        scheduler.with_common_secret = _wrapped(scheduler.with_common_secret, draw_secret)
    for owner, name, wrapper in (
        (compressor.SchedulerCompressor, "compress_finished", faults.compress_finished),
        (stages, "make_probe", faults.make_probe),
        (stages, "run_probe", faults.run_probe),
        (batch, "compress_layer", faults.compress_layer),
        (compressor.Committer, "reserve", faults.reserve),
        (compressor.Committer, "write", faults.write),
        (PrefixIndex, "add", prefix_added),
        (type(load_adapter()), "protected_len", protected_len),
        *((UnifiedRadixCache, name, wrapper) for name, wrapper in host_pool.items()),
    ):
        setattr(owner, name, _wrapped(getattr(owner, name), wrapper))


def _wrapped(original, wrapper):
    return lambda *args, **kwargs: wrapper(original, *args, **kwargs)


def draw_secret(original, config):
    """AROUND ``with_common_secret``: as if each rank were a node, which reads the flags by itself."""
    own = dataclasses.replace(config, secret=secrets.token_hex(16))
    common = original(own)
    logger.info("metasoft inside: drew secret %s", hashlib.sha256(own.secret.encode()).hexdigest())
    logger.info("metasoft inside: uses secret %s", hashlib.sha256(common.secret.encode()).hexdigest())
    return common


# -- faults --------------------------------------------------------------------------------------------------------


class InjectedFault(RuntimeError):
    """Raised on purpose."""


class NanMethod:
    """A method whose importance has a NaN."""

    def __init__(self, method) -> None:
        self._method = method

    def __getattr__(self, name: str):
        return getattr(self._method, name)

    def score_layer(self, view):
        scores = self._method.score_layer(view)
        scores.importance[0, scores.importance.shape[1] // 2] = float("nan")
        return scores


def protected_len(original, adapter, req) -> int:
    return len(req.origin_input_ids) if str(req.rid).startswith("inside-window") else original(adapter, req)


class Faults:
    """Decides, from a seed, which call of which stage fails; where it wraps a function, it is named after it."""

    def __init__(self, settings: dict) -> None:
        self.random = random.Random(settings.get("seed", 0))
        self.rates = {stage: settings.get(stage, 0) for stage in STAGES}
        self.counts = dict.fromkeys(STAGES, 0)
        self.reqs: list = []
        self.struck: set[str] = set()
        self.aims: dict[str, int] = {}  # stage: the call, counted within one probe run, that fails
        self.calls = dict.fromkeys(STAGES, 0)

    def compress_finished(self, original, compressor, batch):
        self.reqs = batch.reqs
        original(compressor, batch)
        if self._named("corrupt"):
            spoil_last_prefix(compressor.scheduler)

    def reserve(self, original, committer, num_slots):
        # Requests reserve one after the other; a named one's turn is not known, so all of its batch fail.
        return None if self._strikes("reserve") else original(committer, num_slots)

    def make_probe(self, original, method, *args):
        # Before anything is embedded; by name once, so that the lengths of what is embedded can be told.
        rids = {req.rid for req in self._named("job")}
        strikes = bool(rids - self.struck) or self.random.random() < self.rates["job"]
        self.struck |= rids
        if strikes:
            self._count("job")
            raise InjectedFault("a job")
        return original(method, *args)

    def run_probe(self, original, runner, body, backend, rows, adapter, **options):
        jobs, layers = len(backend.jobs), runner.model_config.num_hidden_layers
        self.calls = dict.fromkeys(STAGES, 0)
        self.aims = {}
        for stage in ("nan", "layer", "write"):
            job = self.random.randrange(jobs) if self.random.random() < self.rates[stage] else None
            for req in self._named(stage):
                if (row := adapter.row_index(req)) in rows.tolist():
                    job = rows.tolist().index(row)
            if job is not None:
                # A layer of all jobs is written at once.
                self.aims[stage] = self.random.randrange(layers) * (1 if stage == "write" else jobs)
                self.aims[stage] += 0 if stage == "write" else job
        if self._strikes("probe"):
            raise InjectedFault("the probe")
        return original(runner, body, backend, rows, adapter, **options)

    def compress_layer(self, original, job, q, k_new, v_new, pool, method, *args):
        if self._is_aimed("layer"):
            raise InjectedFault("a layer")
        if self._is_aimed("nan"):
            method = NanMethod(method)
        return original(job, q, k_new, v_new, pool, method, *args)

    def load_back(self, original, tree, node_id, mem_quota=None, req=None):
        named = req is not None and str(req.rid).startswith("inside-decline")
        if named or self.random.random() < self.rates["decline"]:
            self._count("decline")
            return False
        return original(tree, node_id, mem_quota, req)

    def write(self, original, *args):
        result = original(*args)
        if self._is_aimed("write"):
            raise InjectedFault("after a layer was written")
        return result

    def _named(self, stage: str) -> list:
        named = [req for req in self.reqs if str(req.rid).startswith(f"inside-{stage}")]
        return [req for req in named if self._is_here(str(req.rid))]

    def _is_here(self, rid: str) -> bool:
        from sglang.srt.runtime_context import get_parallel

        rank = re.search(r"-rank(\d+)", rid)
        return rank is None or int(rank[1]) == get_parallel().attn_tp_rank

    def _strikes(self, stage: str) -> bool:
        strikes = self.random.random() < self.rates[stage] or bool(self._named(stage))
        if strikes:
            self._count(stage)
        return strikes

    def _is_aimed(self, stage: str) -> bool:
        call, self.calls[stage] = self.calls[stage], self.calls[stage] + 1
        if self.aims.get(stage) != call:
            return False
        self._count(stage)
        return True

    def _count(self, stage: str) -> None:
        self.counts[stage] += 1
        logger.warning("metasoft inside: fault %s %d", stage, self.counts[stage])


# -- checks --------------------------------------------------------------------------------------------------------


class Seen:
    """What the checks remember between two of them."""

    scheduler = None
    state: tuple | None = None
    checks = 0
    # By a segment's last virtual id: what its entries may be. More than one thing, where it was compressed again while
    # the host had a copy: the order of sums follows the batch.
    digests: dict[int, set] = {}
    away: set[int] = set()  # by the same id, prefixes that were not on the device at the last check
    returned = 0  # how often one was there again
    # The last virtual id of every segment there ever was. After an eviction another prefix may bring back a segment
    # that both start with, in one node with what follows there: the two then differ inside that node, at the end of a
    # segment.
    segment_ends: set[int] = set()


def prefix_added(original, index, tenant, namespace, prefix, ids):
    """AROUND ``PrefixIndex.add``, just after the commit: what the segment's entries are now, they must remain."""
    known = original(index, tenant, namespace, prefix, ids)
    Seen.segment_ends.add(prefix.virtual_ids[-1])
    if Seen.scheduler is None:
        return known
    try:
        slots = live_slots(Seen.scheduler, namespace, known)
        assert slots is not None, f"a prefix of {known.slots} slots was indexed but is not in the tree"
        assert is_finite(Seen.scheduler, slots), f"a prefix of {known.slots} slots holds numbers that are not finite"
        last, own = next(segments_of(known, slots))
        Seen.digests.setdefault(last, set()).add(digest(Seen.scheduler, own))
    except AssertionError as error:
        logger.error("metasoft inside: BROKEN %s", error)
    return known


def check_when_idle(scheduler) -> None:
    """AFTER ``Scheduler.on_idle``: one check after each change of the scheduler's state."""
    Seen.scheduler = scheduler
    tree, allocator = scheduler.tree_cache, scheduler.token_to_kv_pool_allocator
    if not hasattr(tree, "prefixes") or not scheduler.is_fully_idle():
        return
    state = (scheduler.forward_ct, len(tree.prefixes), allocator.available_size(), tree.evictable_size())
    if state == Seen.state:
        return
    Seen.state = state
    Seen.checks += 1
    problems = [*pool_problems(scheduler)]
    prefixes = [(prefix, namespace) for namespace, prefix in tree.prefixes]
    stale = 0
    for prefix, namespace in prefixes:
        try:
            slots = live_slots(scheduler, namespace, prefix)
        except AssertionError as error:
            problems.append(str(error))
            continue
        if slots is None:
            stale += 1
            Seen.away.add(prefix.segment_ids[-1])
            continue
        for last, part in segments_of(prefix, slots):
            if last in Seen.digests and digest(scheduler, part) not in Seen.digests[last]:
                problems.append(f"the entries of a prefix of {prefix.slots} slots have changed")
        Seen.returned += prefix.segment_ids[-1] in Seen.away
        Seen.away.discard(prefix.segment_ids[-1])
    names = hashlib.sha256(b"".join(sorted(prefix.virtual_ids.tobytes() for prefix, _ in prefixes))).hexdigest()[:8]
    summary = (
        f"check={Seen.checks} prefixes={len(prefixes)} stale={stale} returned={Seen.returned} "
        f"free={allocator.available_size()} "
        f"cached={tree.evictable_size()} pool={scheduler.max_total_num_tokens} names={names}"
    )
    if problems:
        logger.error("metasoft inside: BROKEN %s: %s", summary, "; ".join(problems))
    else:
        logger.info("metasoft inside: ok %s", summary)


def pool_problems(scheduler):
    """Locks, sums, and every page exactly once: free or in the tree."""
    tree, allocator = scheduler.tree_cache, scheduler.token_to_kv_pool_allocator
    if tree.protected_size() != 0:
        yield f"{tree.protected_size()} slots of the tree are locked"
    free, cached, total = allocator.available_size(), tree.evictable_size(), scheduler.max_total_num_tokens
    if free + cached != total:
        yield f"{free} free and {cached} cached slots are not the pool's {total}"
    rows = scheduler.req_to_token_pool
    if rows.available_size() != rows.size:
        yield f"{rows.size - rows.available_size()} request rows are in use"
    page = scheduler.page_size
    in_tree = tree.all_values_flatten().cpu()
    if page > 1:
        offsets = in_tree.view(-1, page) % page
        if not torch.equal(offsets, torch.arange(page).expand_as(offsets)):
            yield "the tree holds a torn page"
        in_tree = in_tree.view(-1, page)[:, 0] // page
    pages = torch.cat([in_tree, free_pages(allocator).cpu()]).sort().values
    if not torch.equal(pages, torch.arange(1, total // page + 1)):
        twice = pages[1:][pages[1:] == pages[:-1]].unique().tolist()
        yield f"free and cached pages are not each page once; twice: {twice[:10]}, {len(pages)} of {total // page}"


def live_slots(scheduler, namespace: tuple, prefix) -> torch.Tensor | None:
    """The slots that the tree holds for a prefix, without touching the tree; None if any of them was evicted.

    Raises:
        AssertionError: the tree holds something that eviction of whole nodes cannot have left.
    """
    tree = scheduler.tree_cache
    matched, node_end, collect = match(tree, prefix.virtual_ids, *tenant_of(namespace))
    assert matched <= prefix.slots, f"{matched} slots matched of a prefix of {prefix.slots}"
    if matched < prefix.slots:
        is_segment_end = matched > 0 and prefix.virtual_ids[matched - 1] in Seen.segment_ends
        assert matched == node_end or is_segment_end, (
            f"a prefix of {prefix.slots} slots differs from the tree within a segment, at {matched} of {node_end}"
        )
        return None
    slots = collect()
    assert len(slots) == node_end, f"the path to a prefix of {prefix.slots} slots holds {len(slots)}, not {node_end}"
    slots = slots[:matched]
    assert len(slots.unique()) == matched, f"a prefix of {prefix.slots} slots holds a slot twice"
    return slots


def segments_of(prefix, slots: torch.Tensor):
    """Of a prefix's segments, the last one first, the last virtual id and the slots."""
    while prefix is not None:
        first = prefix.parent.slots if prefix.parent else 0
        yield prefix.segment_ids[-1], slots[first : prefix.slots]
        prefix = prefix.parent


def match(tree, ids, extra_key, cache_salt):
    """Match ids without touching the tree.

    Returns:
        The length matched, that of the path to the last node it reached into, and a function for that path's slots.
    """
    from sglang.srt.mem_cache.radix_cache import RadixKey

    core = tree.tree_core
    if hasattr(core, "match_full_device_prefix"):
        key = RadixKey(ids, extra_key, cache_salt=cache_salt)
        matched, node, node_end = core.match_full_device_prefix(key)
        return matched, node_end, lambda: core.collect_full_device_indices(node, tree.root_node_handle())
    # SGLang 0.5.17: a tree of Python objects.
    key, node, matched, node_end = RadixKey(ids, extra_key), core.root_node, 0, 0
    while len(key) and (child := node.children.get(key.child_key(tree.page_size))) is not None:
        common = child.key.match(key, page_size=tree.page_size)
        node, matched, node_end, key = child, matched + common, node_end + len(child.key), key[common:]
        if common < len(child.key):
            break
    return matched, node_end, lambda: core.collect_full_device_indices(node.id, core.root_node.id)


def free_pages(allocator) -> torch.Tensor:
    """All free pages; 0.5.17 keeps some of them apart."""
    if hasattr(allocator, "get_all_free_pages"):
        return allocator.get_all_free_pages()
    return torch.cat([allocator.free_pages, allocator.release_pages])


def tenant_of(namespace: tuple) -> tuple:
    """``(extra_key, cache_salt)``: the last entries of a namespace but one."""
    return namespace[-3], namespace[-2]


def spoil_last_prefix(scheduler) -> None:
    namespace, prefix = list(scheduler.tree_cache.prefixes)[-1]
    slots = live_slots(scheduler, namespace, prefix)
    scheduler.token_to_kv_pool_allocator.get_kvcache().get_key_buffer(0)[slots[-1]] += 1


def is_finite(scheduler, slots: torch.Tensor) -> bool:
    pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
    buffers = (
        buffer(layer) for layer in range(pool.layer_num) for buffer in (pool.get_key_buffer, pool.get_value_buffer)
    )
    return all(buffer[slots].float().isfinite().all() for buffer in buffers)  # fp8 has no isfinite


def digest(scheduler, slots: torch.Tensor) -> tuple:
    """What some layers hold in these slots."""
    pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
    layers = torch.linspace(0, pool.layer_num - 1, CHECKED_LAYERS).long().tolist()
    entries = [buffer(layer)[slots] for layer in layers for buffer in (pool.get_key_buffer, pool.get_value_buffer)]
    return tuple(hash(tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes()) for tensor in entries)
