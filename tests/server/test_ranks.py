"""Three tensor-parallel ranks of which one fails: all of them go on in step, with the same tree, and answer as one."""

import re

import pytest
import requests

from tests.server.checks import SALT, SOFT_TOKENS, assert_pool_is_whole, inside_env, inside_lines, metasoft, wait_until

pytestmark = pytest.mark.server

POOL_TOKENS, WINDOW, PROMPT_TOKENS, NEW_TOKENS, RANKS = 8192, 64, 800, 6, 3
# The demo model has three KV heads.
FLAGS = [*SOFT_TOKENS, "--enable-metrics", "--max-total-tokens", str(POOL_TOKENS), "--dtype", "float32"]
STAGES = {"job": "fault", "layer": "fault", "write": "fault", "nan": "fault", "reserve": "no_free_slots"}


def prompt(document_ids, number: int) -> list[int]:
    return document_ids[150 * number :][:PROMPT_TOKENS]


@pytest.fixture(scope="module")
def answers_of_one(start_server, document_ids):
    """What one process says to each prompt, uncompressed and compressed."""
    server = start_server(*FLAGS)
    answers = []
    for number in range(len(STAGES)):
        ids = prompt(document_ids, number)
        raw = server.generate(ids, NEW_TOKENS, custom_params={"metasoft_ratio": 1}, **{SALT: "plain"})
        answers.append((raw["output_ids"], server.generate(ids, NEW_TOKENS)["output_ids"]))
    return answers


@pytest.fixture(scope="module")
def server(answers_of_one, start_server):
    """Each rank has drawn a secret of its own, as each node does."""
    return start_server(*FLAGS, "--tp-size", str(RANKS), env=inside_env(own_secrets=True))


def last_states(server) -> dict[str, str]:
    """For each rank what it last wrote about its tree, pool and prefixes."""
    lines = inside_lines(server, "ok")
    return {re.search(r" TP(\d)", line)[1]: re.search(r"prefixes=.*", line)[0] for line in lines}


def assert_ranks_agree(server) -> None:
    assert not inside_lines(server, "BROKEN"), "\n".join(inside_lines(server, "BROKEN"))
    wait_until(server, lambda _: len(set(last_states(server).values())) == 1, f"one state: {last_states(server)}")
    assert len(last_states(server)) == RANKS


def test_the_first_ranks_secret_is_everybodys(server):
    drawn, used = (
        [re.search(r"secret (\w+)", line)[1] for line in inside_lines(server, word)] for word in ("drew", "uses")
    )
    assert len(drawn) == len(set(drawn)) == RANKS and len(used) == RANKS and len(set(used)) == 1
    assert used[0] in drawn


@pytest.mark.parametrize("stage", STAGES)
def test_a_fault_of_one_rank_is_everybodys(server, document_ids, answers_of_one, stage):
    """Nobody hangs or parts: served raw as by one process, then compressed as by one process, then reused."""
    number = list(STAGES).index(stage)
    ids, (raw, compressed) = prompt(document_ids, number), answers_of_one[number]
    response = server.generate(ids, NEW_TOKENS, rid=f"inside-{stage}-rank1")
    assert len(inside_lines(server, f"fault {stage}")) == 1
    nothing = {"span_tokens": 0, "kv_tokens": PROMPT_TOKENS, "reused_tokens": 0, "bypass": STAGES[stage]}
    assert metasoft(response) == nothing and response["output_ids"] == raw
    response = server.generate(ids, NEW_TOKENS)
    assert metasoft(response)["span_tokens"] == PROMPT_TOKENS - WINDOW and response["output_ids"] == compressed
    assert metasoft(server.generate(ids, NEW_TOKENS))["reused_tokens"] == PROMPT_TOKENS - WINDOW
    assert_ranks_agree(server)


def test_a_fault_of_one_rank_concerns_one_request_of_a_batch(server, document_ids):
    prompts = [document_ids[1500 + 100 * n :][:700] for n in range(3)]
    body = {"input_ids": prompts, "rid": ["a", "inside-nan-rank2-b", "c"]}
    body["sampling_params"] = {"temperature": 0, "max_new_tokens": 4}
    reports = [metasoft(response) for response in requests.post(f"{server.url}/generate", json=body).json()]
    assert sorted(report["span_tokens"] for report in reports) == [0, 700 - WINDOW, 700 - WINDOW]
    assert reports[1]["bypass"] == "fault"
    assert_pool_is_whole(server, POOL_TOKENS, expects_faults=True)
    assert_ranks_agree(server)


def test_what_cannot_be_agreed_upon_ends_the_server(server, document_ids):
    """Last. Rank 1 never gets to the probe, in which the others wait for it."""
    with pytest.raises(requests.RequestException):
        server.generate(document_ids[2000:2900], 4, rid="inside-probe-rank1")
    assert server.process.wait(timeout=120) is not None
    assert "in which the ranks cannot agree: the server ends" in server.log.read_text()
