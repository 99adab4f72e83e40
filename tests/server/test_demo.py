"""The demo on the real model: both caches give the right answers, and later prompts reuse the first one's document."""

import re

import pytest

from sglang_metasoft.demo import run
from sglang_metasoft.demo.conversation import converse
from sglang_metasoft.demo.progress import Progress
from sglang_metasoft.demo.questions import MAX_ANSWER_TOKENS, SHIPPED, check_length, read_task

pytestmark = pytest.mark.server

CONTEXT_TOKENS = 8192


@pytest.fixture(scope="session")
def model_dir(full_model_dir):
    return full_model_dir


@pytest.fixture(scope="module")
def server(start_server):
    return start_server("--enable-metasoft")


@pytest.fixture(scope="module")
def asked(server, tokenizer):
    """The boundary, and each shipped question with its answers."""
    task = read_task(None, [], False)
    boundary_tokens = check_length(task, tokenizer, CONTEXT_TOKENS)
    return boundary_tokens, list(converse(server, task, boundary_tokens))


def test_both_caches_give_the_right_answers(asked):
    _, answered = asked
    assert [question for question, _ in answered] == list(SHIPPED)
    for question, answers in answered:
        assert question.right in answers["full"].text and question.right in answers["compressed"].text, answers


def test_the_compressed_cache_holds_a_quarter_of_the_document(asked):
    boundary_tokens, answered = asked
    for _, answers in answered:
        full, compressed = answers["full"], answers["compressed"]
        assert full.entries == full.prompt_tokens and full.reused_tokens == 0
        assert compressed.bypass is None
        assert compressed.entries == compressed.prompt_tokens - boundary_tokens + -(-boundary_tokens // 4)


def test_the_next_turn_and_the_next_question_reuse_the_compressed_document(asked):
    boundary_tokens, (first, *later) = asked
    assert first[1]["compressed"].cached_tokens == 0 == first[1]["full"].cached_tokens
    assert later[0][0].is_next_turn and not later[1][0].is_next_turn
    for _, answers in later:
        assert answers["compressed"].reused_tokens == boundary_tokens
        for answer in answers.values():
            assert boundary_tokens <= answer.cached_tokens < answer.prompt_tokens


def test_the_demo_prints_own_questions_with_both_caches_and_the_memory_effect(server, asked, capsys):
    """On the running server: all that follows the start."""
    boundary_tokens, answered = asked
    question, answers = answered[-1]
    run.ask_all(server, read_task(None, [question.text], False), boundary_tokens, Progress(1))
    out = capsys.readouterr().out
    assert f"Q: {question.text}\n" in out and "The text says" not in out
    tokens, entries = answers["full"].prompt_tokens, answers["compressed"].entries
    assert re.search(rf"^entries held +{tokens:,} +{entries:,} \(3\.\dx fewer\)$", out, re.MULTILINE), out
    pool_tokens = server.info()["max_total_num_tokens"]
    raw, compressed = re.search(r"decodes (\d+) such prompts .* and (\d+) with", " ".join(out.split())).groups()
    assert int(raw) == pool_tokens // (tokens + MAX_ANSWER_TOKENS) and int(compressed) > 3 * int(raw)
