"""What a request leaves in the tree, and what it may not: SGLang's own tree and requests, without a model."""

import pytest

from tests.unit.machine import Machine

PROMPT = [*range(1500)]


def serve(machine, ids, outputs=(1, 2), **fields):
    priority, keeps_out = fields.pop("priority", None), fields.pop("keeps_out", False)
    req = machine.arrive(ids, **fields)
    req.priority, req.skip_radix_cache_insert = priority, keeps_out
    machine.prefill(req)
    machine.decode(req, outputs)
    machine.finish(req)
    machine.check_idle()
    return req.metasoft


@pytest.mark.parametrize("keep_raw", [True, False], ids=["keep-raw", "free-raw"])
@pytest.mark.parametrize("chunk", [None, 512], ids=["whole", "chunked"])
@pytest.mark.parametrize("page", [1, 16])
def test_a_prompt_that_sglang_keeps_out_of_the_tree_leaves_nothing(page, chunk, keep_raw):
    machine = Machine(6400, page, chunk, keep_raw=keep_raw, during_prefill=True)
    state = serve(machine, PROMPT, keeps_out=True)
    assert state.compressed is not None  # compressed all the same
    assert machine.tree.evictable_size() == 0 and len(machine.tree.prefixes) == machine.tree.prefixes.num_tokens == 0
    # Nor does it disturb what others have left, which it may read.
    left = serve(machine, PROMPT), machine.tree.evictable_size(), len(machine.tree.prefixes)
    again = serve(machine, PROMPT + [7] * 800, keeps_out=True)
    assert again.reused_tokens > 0 and again.compressed.tokens > left[0].compressed.tokens
    assert (machine.tree.evictable_size(), len(machine.tree.prefixes)) == left[1:]


@pytest.mark.parametrize("policy", ["lru", "priority"])
def test_a_client_cannot_pin_its_prefix(policy):
    """Unless the operator chose to evict by priority, what was used least recently goes, whoever sent it."""
    machine = Machine(4800, eviction_policy=policy)
    pinned, other, filling = ([start + i for i in range(1500)] for start in (0, 2000, 4000))
    serve(machine, pinned, priority=100)
    serve(machine, other)
    for number in range(12):
        serve(machine, [number, *filling])
    kept = [serve(machine, ids).reused_tokens > 0 for ids in (pinned, other)]
    assert kept == ([False, False] if policy == "lru" else [True, False])


def test_one_prompt_has_other_virtual_ids_for_every_tenant_setting_and_generation_of_weights():
    machine, ids = Machine(12_800), set()
    others = [{}, {"salt": "a"}, {"salt": "b"}, {"ratio": 2}, {"salt": "a", "ratio": 2}]
    for generation in range(2):
        for fields in others:
            state = serve(machine, PROMPT, **fields)
            assert state.reused_tokens == 0 and not ids.intersection(state.compressed.virtual_ids)
            ids.update(state.compressed.virtual_ids)
        machine.compressor.namespaces.generation = generation + 1
        machine.tree.prefixes.clear()


@pytest.mark.parametrize("priority", [None, -(1 << 63)])
def test_raw_twins_go_before_any_prefix(priority):
    """Ten prompts of 1,500 tokens in a pool that holds one raw and six others compressed."""
    machine = Machine(4400, eviction_policy="lru" if priority is None else "priority")
    prompts = [[start + i for i in range(1500)] for start in range(0, 20_000, 2000)]
    for ids in prompts:
        serve(machine, ids, priority=priority)
    reused = [serve(machine, ids, priority=priority).reused_tokens > 0 for ids in reversed(prompts)]
    assert reused == [True] * 7 + [False] * 3


@pytest.mark.parametrize("max_new_tokens", [0, 1])
def test_a_prompt_without_output_is_compressed_and_read_as_any_other(max_new_tokens):
    machine = Machine(6400)
    warm = serve(machine, PROMPT, [5], max_new_tokens=max_new_tokens)
    assert warm.compressed is not None and warm.report().get("metasoft_bypass") is None
    assert serve(machine, PROMPT, [5], max_new_tokens=max_new_tokens).reused_tokens == warm.compressed.tokens
    question = serve(machine, [*PROMPT, 7, 8, 9])
    assert question.reused_tokens == warm.compressed.tokens  # its probe saw nothing but the document


@pytest.mark.parametrize("keep_raw", [True, False], ids=["keep-raw", "free-raw"])
@pytest.mark.parametrize("chunk", [None, 512], ids=["whole", "chunked"])
@pytest.mark.parametrize("page", [1, 16])
def test_equal_prompts_of_one_batch_are_probed_once(page, chunk, keep_raw):
    machine = Machine(9600, page, chunk, keep_raw=keep_raw)
    reqs = [machine.arrive(PROMPT) for _ in range(4)]
    machine.prefill(*reqs)
    assert machine.compressor.stages.num_probes == 1 and len(machine.tree.prefixes) == 1
    rows = [machine.compressor.committer.row(req)[: req.metasoft.compressed.slots].tolist() for req in reqs]
    assert all(row == rows[0] for row in rows)  # one copy, whole, in the tree
    for number, req in enumerate(reqs):
        machine.decode(req, [number, 5, 6])
        machine.finish(req)
    machine.check_idle()
    assert machine.tree.evictable_size() < 1500 * (keep_raw + 0.25) + 150


@pytest.mark.parametrize("page", [1, 16])
def test_questions_of_one_batch_over_one_document_probe_it_once(page):
    machine = Machine(16_000, page)
    serve(machine, PROMPT + [2000] * 20)
    before = machine.compressor.stages.num_probes
    reqs = [machine.arrive(PROMPT + [2001 + number] * 20) for number in range(3)]
    reqs.append(machine.arrive(PROMPT + [2010] * 900))  # with a second segment of its own
    machine.prefill(*reqs)
    assert machine.compressor.stages.num_probes - before == 2
    assert {req.metasoft.report()["metasoft_span_tokens"] for req in reqs} == {
        1500 // page * page, (2400 - 64) // page * page,
    }  # fmt: skip
    for req in reqs:
        machine.decode(req, [1, 2, 3])
        machine.finish(req)
    machine.check_idle()


def test_a_twin_is_compressed_itself_if_the_first_could_not_be():
    machine = Machine(9600)
    reqs = [machine.arrive(PROMPT) for _ in range(2)]
    reserve, calls = machine.compressor.committer.reserve, []
    machine.compressor.committer.reserve = lambda slots: calls.append(slots) or (reserve(slots) if calls[1:] else None)
    machine.prefill(*reqs)
    assert [req.metasoft.report().get("metasoft_bypass") for req in reqs] == ["no_free_slots", None]
