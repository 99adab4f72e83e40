"""The index of compressed prefixes compares tokens, separates tenants and namespaces, and stays bounded."""

import random
from array import array

import pytest
from metasoft_patches.cache.prefix_index import FIRST_VIRTUAL_ID, CompressedPrefix, PrefixIndex, make_virtual_ids

SECRET = "00" * 16


def prompt(length, seed=0):
    return array("q", [(seed * 7919 + i * 31) % 49152 for i in range(length)])


def make(ids, tokens, seen=None, parent=None, namespace="a", slots=10):
    start, seen = parent.tokens if parent else 0, max(seen or 0, tokens)
    virtual = make_virtual_ids(SECRET, namespace, parent, ids[start:tokens], ids[tokens:seen], slots)
    return CompressedPrefix.extend(parent, virtual, tokens, seen)


def add(index, ids, tokens, seen=None, parent=None, namespace="a", tenant="t"):
    return index.add(tenant, namespace, make(ids, tokens, seen, parent, namespace), ids)


def found(index, ids, namespace="a", tenant="t", prompt_tokens=None, limit=9):
    return index.match(tenant, namespace, ids, prompt_tokens or len(ids), limit)


def find(index, ids, **kwargs):
    for prefix in (prefixes := found(index, ids, **kwargs).prefixes):
        index.touch(prefix)
    return prefixes[0] if prefixes else None


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 1000])
def test_a_prefix_is_found_for_any_prompt_that_starts_with_it(tokens):
    index, ids = PrefixIndex(10**6), prompt(1100)
    prefix = add(index, ids, tokens)
    assert find(index, ids) is prefix
    assert find(index, ids[: tokens + 1]) is prefix
    assert find(index, ids[:tokens]) is None  # one token must be left to compute
    assert find(index, prompt(1100, seed=1)) is None


def test_a_prefix_serves_only_prompts_that_have_all_that_its_probe_saw():
    index, ids = PrefixIndex(10**6), prompt(1100)
    prefix = add(index, ids, 900, seen=964)
    assert find(index, ids) is find(index, ids[:964]) is prefix
    assert find(index, ids[:963]) is None
    assert find(index, ids[:963] + prompt(200, seed=1)) is None
    # What an earlier segment's probe saw counts, although the last one ended at a boundary and saw less.
    shorter = add(index, ids, 940, seen=940, parent=prefix)
    assert shorter.required_tokens == 964
    assert find(index, ids[:963]) is None and find(index, ids[:964]) is shorter


def test_outputs_of_a_retracted_request_are_part_of_what_was_seen():
    index, ids, outputs = PrefixIndex(10**6), prompt(1000), prompt(20, seed=2)
    prefix = add(index, ids + outputs, 956, seen=1020)
    assert find(index, ids) is None
    assert find(index, ids + outputs, prompt_tokens=1000) is prefix
    assert find(index, ids + outputs, prompt_tokens=956) is None


def test_prefixes_come_longest_first_and_few():
    index, ids = PrefixIndex(10**6), prompt(1100)
    for tokens in (130, 700, 640, 650):
        add(index, ids, tokens, seen=1000 - tokens)
    assert [prefix.tokens for prefix in found(index, ids, limit=3).prefixes] == [700, 650, 640]
    assert [prefix.tokens for prefix in found(index, ids[:690]).prefixes] == [650, 640]


def test_tenants_and_namespaces_never_share():
    index, ids = PrefixIndex(10**6), prompt(500)
    add(index, ids, 400, namespace=("tenant 1",), tenant="tenant 1")
    assert find(index, ids, namespace=("tenant 2",), tenant="tenant 1") is None
    assert find(index, ids, namespace=("tenant 1",), tenant="tenant 2") is None
    assert found(index, ids, tenant="tenant 2").seen_tokens == 0
    assert found(index, ids, tenant="tenant 1").seen_tokens == 400


def test_virtual_ids_follow_from_all_that_shapes_the_entries_namespace_and_secret():
    ids, tail = prompt(300), prompt(9, seed=5)
    first = make_virtual_ids(SECRET, "a", None, ids, tail, 50)
    assert first == make_virtual_ids(SECRET, "a", None, ids, tail, 50)
    assert len(set(first)) == 50 and all(FIRST_VIRTUAL_ID <= value < 2 * FIRST_VIRTUAL_ID for value in first)
    others = [
        make_virtual_ids("01" * 16, "a", None, ids, tail, 50),
        make_virtual_ids(SECRET, "b", None, ids, tail, 50),
        make_virtual_ids(SECRET, "a", CompressedPrefix.extend(None, first, 300, 300), ids, tail, 50),
        make_virtual_ids(SECRET, "a", None, prompt(300, seed=1), tail, 50),
        make_virtual_ids(SECRET, "a", None, ids, tail[:8], 50),
        make_virtual_ids(SECRET, "a", None, ids, tail[:0], 50),
        make_virtual_ids(SECRET, "a", None, ids[:299], ids[299:] + tail, 50),
        make_virtual_ids(SECRET, "a", None, ids, tail, 49),
    ]
    for other in others:
        assert not set(first) & set(other)


def test_a_prefix_is_its_segments():
    ids = prompt(3000)
    prefix, own = None, []
    for end in range(500, 3000, 500):
        prefix = make(ids, end, seen=end + 64, parent=prefix)
        own += prefix.segment_ids
        assert list(prefix.virtual_ids) == own and prefix.slots == len(own) and prefix.offset == end - len(own)


def test_the_index_forgets_the_least_recently_used_first():
    index = PrefixIndex(max_tokens=1000)
    prompts = [prompt(500, seed) for seed in range(4)]
    for ids in prompts[:2]:
        add(index, ids, 450)
    find(index, prompts[0])
    add(index, prompts[2], 450)
    assert find(index, prompts[1]) is None
    assert find(index, prompts[0]) and find(index, prompts[2])
    assert index.num_tokens == 900 and len(index) == 2


def test_what_prompts_have_in_common_counts_once():
    """One long prompt in small chunks, and a chat of many turns: linear in tokens, not in segments times tokens."""
    index, ids = PrefixIndex(10**6), prompt(20_000)
    prefix = None
    for end in range(512, 20_000, 512):
        prefix = add(index, ids, end - 64, seen=end, parent=prefix)
    index.remember_prompt("t", ids)
    assert index.num_tokens == 20_000 and len(index) == 20_000 // 512
    for turn in range(1, 50):
        index.remember_prompt("t", ids + prompt(10 * turn, seed=1))
    assert index.num_tokens == 20_000 + 490
    assert sum(len(prefix.segment_ids) for _, prefix in index) == prefix.slots


def test_discard_and_clear():
    index, ids = PrefixIndex(10**6), prompt(500)
    prefix = add(index, ids, 400)
    assert add(index, ids, 400) is prefix and len(index) == 1  # the same prefix again is no second entry
    index.discard(prefix)
    index.discard(prefix)
    index.touch(prefix)
    assert find(index, ids) is None and len(index) == 0
    assert add(index, ids, 400) is not prefix
    index.clear()
    assert find(index, ids) is None and len(index) == 0 and index.num_tokens == 0


def test_a_prefix_outlives_its_parent_in_the_index():
    """The tree evicts what a prefix ends with first; yet the shorter one may be discarded when it is tried alone."""
    index, ids = PrefixIndex(10**6), prompt(1100)
    parent = add(index, ids, 400)
    child = add(index, ids, 800, parent=parent)
    index.discard(parent)
    assert find(index, ids) is child and find(index, ids[:800]) is None
    assert child.virtual_ids == parent.segment_ids + child.segment_ids


def test_the_index_knows_where_a_prompt_leaves_earlier_ones_of_its_tenant():
    index, head = PrefixIndex(10**6), prompt(1000)
    first, second = head + prompt(300, seed=1), head + prompt(1, seed=2)
    index.remember_prompt("t", first)
    assert found(index, second)[1:] == (1000, 1000)
    assert found(index, second, tenant="u")[1:] == found(index, prompt(1000, seed=3))[1:] == (0, 0)
    # A repeat leaves nobody, but others leave it.
    assert found(index, first)[1:] == (1300, 0)
    index.remember_prompt("t", second)
    assert found(index, first)[1:] == (1300, 1000) and found(index, second)[1:] == (1001, 1000)
    index.clear()
    assert found(index, second)[1:] == (0, 0)


def test_the_index_remembers_a_bounded_number_of_prompts():
    index = PrefixIndex(1280)
    prompts = [prompt(640, seed) for seed in range(3)]
    for ids in prompts:
        index.remember_prompt("t", ids)
    assert [found(index, ids).seen_tokens for ids in prompts] == [0, 640, 640]
    index.remember_prompt("t", prompt(5000, seed=9))  # one is remembered even so
    assert [found(index, ids).seen_tokens for ids in (*prompts, prompt(5000, seed=9))] == [0, 0, 0, 5000]


@pytest.mark.parametrize("seed", range(5))
def test_the_index_answers_as_a_list_of_prompts_would(seed):
    """Random prompts over three tokens, so that they fork everywhere; nothing is forgotten."""
    rng = random.Random(seed)
    index, prompts, prefixes = PrefixIndex(10**6), [], []
    for _ in range(60):
        ids = array("q", rng.choices(range(3), k=rng.randint(2, 12)))
        if prompts and rng.random() < 0.5:
            ids = rng.choice(prompts)[: rng.randint(1, 12)] + ids
        result = found(index, ids, limit=999)
        common = [len(ids) if ids == other[: len(ids)] else _common(ids, other) for other in prompts]
        assert result.seen_tokens == max(common, default=0)
        fitting = [c for c, required in prefixes if c.tokens < len(ids) and ids[: len(required)] == required]
        assert {id(c) for c in result.prefixes} == {id(c) for c in fitting}
        if result.seen_tokens == len(ids):
            leaving = [length for length in common if length < len(ids)]
            forks = [length for length in leaving if len(prompts[common.index(length)]) > length]
            assert result.parting_tokens == max(forks, default=0)
        index.remember_prompt("t", ids)
        prompts.append(ids)
        tokens = rng.randint(1, len(ids))
        seen = rng.randint(tokens, len(ids))
        prefix = make(ids, tokens, seen, slots=3)
        if index.add("t", "a", prefix, ids) is prefix:
            prefixes.append((prefix, ids[:seen]))
    assert index.num_tokens == len({bytes(ids[:n]) for ids in prompts for n in range(1, len(ids) + 1)})


def _common(a, b):
    length = 0
    while length < min(len(a), len(b)) and a[length] == b[length]:
        length += 1
    return length
