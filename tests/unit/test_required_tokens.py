"""No entry ever serves a prompt that lacks a token which shaped it: over random documents, questions and evictions."""

import random
from collections import Counter

import pytest

from tests.unit.machine import Machine

MIN_TOKENS = 128


def length_of_question(rng: random.Random) -> int:
    return rng.choice((1, 2, 20, 50, 63, 64, 65, 90, rng.randint(1, 2000)))


@pytest.mark.parametrize("keep_raw", [True, False], ids=["keep-raw", "free-raw"])
@pytest.mark.parametrize("chunk", [None, 256], ids=["whole", "chunked"])
@pytest.mark.parametrize("page", [1, 16])
@pytest.mark.parametrize("during_prefill", [False, True], ids=["after", "during"])
def test_no_prefix_is_reused_whose_probe_saw_what_a_prompt_does_not_have(page, chunk, keep_raw, during_prefill):
    rng = random.Random(repr((page, chunk, keep_raw, during_prefill)))
    machine = Machine(
        9600, page, chunk, min_tokens=MIN_TOKENS, keep_raw=keep_raw, during_prefill=during_prefill, index_tokens=20_000
    )
    documents = [[rng.randrange(50) for _ in range(rng.randint(200, 1500))] for _ in range(3)]
    chats = [rng.choice(documents)]
    counts: Counter = Counter()
    for _ in range(60):
        head = rng.choice((rng.choice(documents), rng.choice(chats)))[: rng.choice((None, None, None, 700))]
        # A few tokens alone, so that questions often begin alike, or are one another's beginning.
        question = [rng.randrange(3)] * rng.randint(0, 2) + [rng.randrange(50) for _ in range(length_of_question(rng))]
        prompt = (head + question)[:4000]
        same = rng.choice((1, 1, 1, 2))  # several of one batch, which part at their end or not at all
        reqs = [
            machine.arrive(prompt + [rng.randrange(2)], salt=rng.choice((None, None, "other")), max_new_tokens=64)
            for _ in range(same)
        ]
        machine.prefill(*reqs)
        for req in reqs:
            counts["reused"] += req.metasoft.reused_tokens > 0
            machine.decode(req, [rng.randrange(50) for _ in range(rng.randint(1, 20))])
            if rng.random() < 0.3:
                machine.retract(req)
                machine.prefill(req)
                counts["retracted"] += 1
            if rng.random() < 0.5:
                chats.append([*machine.ids(req)])
            machine.finish(req)
        machine.check_idle()
    counts["prefixes"] = len(machine.tree.prefixes)
    assert min(counts[what] for what in ("reused", "retracted", "prefixes")) >= 5, counts


@pytest.mark.parametrize("page", [1, 16])
@pytest.mark.parametrize("length", [1, 2, 20, 63, 64, 65, 90, 500, 2000])
def test_a_shared_document_has_a_segment_of_its_own_from_the_second_prompt_on(page, length):
    machine = Machine(20_000, page)
    rng = random.Random(length)
    document = [rng.randrange(1000) for _ in range(1500)]
    whole = len(document) // page * page
    reused = []
    for number in range(4):
        req = machine.arrive(document + [1000 + number] + [rng.randrange(1000) for _ in range(length - 1)])
        machine.prefill(req)
        reused.append(req.metasoft.reused_tokens)
        if number:
            prefix = req.metasoft.compressed
            while prefix.parent is not None:
                prefix = prefix.parent
            assert prefix.tokens == prefix.required_tokens == whole
        machine.decode(req, [1])
        machine.finish(req)
    assert reused == [0, 0, whole, whole]


@pytest.mark.parametrize("page", [1, 16])
@pytest.mark.parametrize("end", [0, -1], ids=["repeat", "last token differs"])
def test_a_repeat_reuses_its_own_prefix(page, end):
    machine = Machine(6400, page)
    prompt = [*range(1500)]
    for number in range(2):
        req = machine.arrive(prompt[: len(prompt) + end] + [7 + number] * -end)
        machine.prefill(req)
        machine.decode(req, [1, 2])
        machine.finish(req)
    assert (req.metasoft.reused_tokens > 0) is (end == 0)
