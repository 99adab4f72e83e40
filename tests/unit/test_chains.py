"""The index of compressed prefixes compares tokens, separates namespaces and stays bounded."""

from array import array

import pytest

from sglang_metasoft import chains
from sglang_metasoft.chains import (
    BLOCK_TOKENS,
    FIRST_VIRTUAL_ID,
    Chain,
    ChainIndex,
    make_virtual_ids,
    prefix_digests,
)

SECRET = "00" * 16


def prompt(length, seed=0):
    return array("q", [(seed * 7919 + i * 31) % 49152 for i in range(length)])


def add(index, ids, tokens, namespace="a", slots=10):
    virtual = make_virtual_ids(SECRET, namespace, None, ids[:tokens], slots)
    return index.add(namespace, Chain(ids[:tokens], virtual), prefix_digests(ids))


def find(index, ids, namespace="a"):
    found = index.candidates(namespace, ids, prefix_digests(ids), limit=1)
    for chain in found:
        index.touch(chain)
    return found[0] if found else None


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 1000])
def test_a_chain_is_found_for_any_prompt_that_starts_with_it(tokens):
    index, ids = ChainIndex(10**6), prompt(1100)
    chain = add(index, ids, tokens)
    assert find(index, ids) is chain
    assert find(index, ids[: tokens + 1]) is chain
    assert find(index, ids[:tokens]) is None  # one token must be left to compute
    assert find(index, prompt(1100, seed=1)) is None


def test_candidates_come_longest_first_and_few():
    index, ids = ChainIndex(10**6), prompt(1100)
    for tokens in (130, 700, 640, 650):
        add(index, ids, tokens)
    lengths = [chain.tokens for chain in index.candidates("a", ids, prefix_digests(ids), limit=3)]
    assert lengths == [700, 650, 640]


def test_the_longest_chain_wins():
    index, ids = ChainIndex(10**6), prompt(1100)
    for tokens in (130, 640, 650, 700):
        add(index, ids, tokens)
    assert find(index, ids).tokens == 700
    assert find(index, ids[:690]).tokens == 650


def test_namespaces_never_share():
    index, ids = ChainIndex(10**6), prompt(500)
    add(index, ids, 400, namespace=("tenant 1",))
    assert find(index, ids, namespace=("tenant 2",)) is None


def test_a_hash_collision_gives_no_foreign_chain(monkeypatch):
    monkeypatch.setattr(chains, "prefix_digests", lambda ids: [b"same"] * (len(ids) // 64 + 1))
    index, mine, theirs = ChainIndex(10**6), prompt(500), prompt(500, seed=3)
    same = chains.prefix_digests(mine)
    index.add("a", Chain(theirs[:448], make_virtual_ids(SECRET, "a", None, theirs[:448], 9)), same)
    assert index.candidates("a", mine, same, limit=9) == []
    assert len(index.candidates("a", theirs, same, limit=9)) == 1


def test_virtual_ids_follow_from_content_namespace_and_secret():
    ids = prompt(300)
    first = make_virtual_ids(SECRET, "a", None, ids, 50)
    assert first == make_virtual_ids(SECRET, "a", None, ids, 50)
    assert len(set(first)) == 50 and all(FIRST_VIRTUAL_ID <= value < 2 * FIRST_VIRTUAL_ID for value in first)
    others = [
        make_virtual_ids("01" * 16, "a", None, ids, 50),
        make_virtual_ids(SECRET, "b", None, ids, 50),
        make_virtual_ids(SECRET, "a", Chain(ids, first), ids, 50),
        make_virtual_ids(SECRET, "a", None, prompt(300, seed=1), 50),
        make_virtual_ids(SECRET, "a", None, ids, 49),
    ]
    for other in others:
        assert not set(first) & set(other)


def test_the_index_forgets_the_least_recently_used_first():
    index = ChainIndex(max_tokens=1000)
    prompts = [prompt(500, seed) for seed in range(4)]
    for ids in prompts[:2]:
        add(index, ids, 450)
    find(index, prompts[0])
    add(index, prompts[2], 450)
    assert find(index, prompts[1]) is None
    assert find(index, prompts[0]) and find(index, prompts[2])
    assert index.num_tokens == 900 and len(index) == 2


def test_discard_and_clear():
    index, ids = ChainIndex(10**6), prompt(500)
    chain = add(index, ids, 400)
    assert add(index, ids, 400) is chain and len(index) == 1  # the same chain again is no second entry
    index.discard(chain)
    index.discard(chain)
    assert find(index, ids) is None and index.num_tokens == 0
    add(index, ids, 400)
    index.clear()
    assert find(index, ids) is None and len(index) == 0


def test_the_index_knows_where_a_prompt_leaves_earlier_ones_of_its_tenant():
    index, head = ChainIndex(10**6), prompt(1000)
    index.remember_prompt("a", prefix_digests(head + prompt(300, seed=1)))
    other = prefix_digests(head + prompt(300, seed=2))
    assert index.seen_tokens("a", other) == 1000 // BLOCK_TOKENS * BLOCK_TOKENS
    assert index.seen_tokens("b", other) == 0
    assert index.seen_tokens("a", prefix_digests(prompt(1000, seed=3))) == 0
    index.clear()
    assert index.seen_tokens("a", other) == 0


def test_the_index_remembers_a_bounded_number_of_prompts():
    index = ChainIndex(20 * BLOCK_TOKENS)
    digests = [prefix_digests(prompt(10 * BLOCK_TOKENS, seed)) for seed in range(3)]
    for prompt_digests in digests:
        index.remember_prompt("a", prompt_digests)
    assert [index.seen_tokens("a", known) for known in digests] == [0, 10 * BLOCK_TOKENS, 10 * BLOCK_TOKENS]
