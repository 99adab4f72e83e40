"""HiCache: what a small device pool evicts between turns comes back from the host, and nothing else changes."""

from importlib.metadata import version

import pytest
import requests

from tests.server.checks import (
    SOFT_TOKENS,
    assert_pool_is_whole,
    assert_sound_after_all,
    inside_env,
    inside_lines,
    metasoft,
)

if version("sglang") == "0.5.17":
    pytest.skip("HiCache is refused there", allow_module_level=True)

pytestmark = pytest.mark.server

POOL_TOKENS, HOST_RATIO, WINDOW, NEW_TOKENS = 2560, 6, 64, 6
CHATS, PROMPT_TOKENS = 3, 1000
ADMIN = {"Authorization": "Bearer admin"}
HOST = ("--enable-hierarchical-cache", "--hicache-ratio", str(HOST_RATIO))
FLAGS = (
    "--dtype", "float32", "--max-total-tokens", str(POOL_TOKENS), "--enable-metrics", "--enable-cache-report", *HOST,
)  # fmt: skip
# Name: flags of both servers. Each write policy, layout and I/O backend, page size and tp size is in one of them.
VARIANTS = {
    "as it is": (),
    "pages of 16, direct copies": (
        "--page-size", "16", "--hicache-mem-layout", "page_first_direct", "--hicache-io-backend", "direct",
        "--chunked-prefill-size", "256",
    ),
    "fp8, pages of 64, on the second hit": (
        "--page-size", "64", "--kv-cache-dtype", "fp8_e4m3", "--hicache-write-policy", "write_through_selective",
        "--hicache-mem-layout", "page_head",
    ),
    "written back": ("--hicache-write-policy", "write_back", "--hicache-mem-layout", "layer_first"),
    "written back, no overlap": (
        "--hicache-write-policy", "write_back", "--disable-overlap-schedule", "--hicache-io-backend", "direct",
        "--hicache-mem-layout", "layer_first", "--page-size", "16",
    ),
    "three ranks": ("--tp-size", "3"),
}  # fmt: skip
SLOW = set(VARIANTS) - {"as it is"}


def prompts_of(document_ids) -> list[list[int]]:
    return [document_ids[number * 700 :][:PROMPT_TOKENS] for number in range(CHATS)]


def converse(server, document_ids, tokenizer, times: int = 1) -> list[list[dict]]:
    """Three turns of each chat; between two of them the others go by, and the device pool has no room for all.

    Args:
        times: how often each turn is asked, one after the other.
    """
    question = tokenizer("\nWhat else did he say?")["input_ids"]
    chats, answers = prompts_of(document_ids), []
    for _ in range(3):
        answers.append([[server.generate(ids, NEW_TOKENS) for _ in range(times)][-1] for ids in chats])
        chats = [ids + one["output_ids"] + question for ids, one in zip(chats, answers[-1], strict=True)]
    return answers


def outputs(answers) -> list[list[list[int]]]:
    return [[one["output_ids"] for one in turn] for turn in answers]


def from_host(response: dict) -> int:
    """Of a response's prompt tokens, those that were loaded from the host."""
    return (response["meta_info"]["cached_tokens_details"] or {"host": 0})["host"]


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in VARIANTS]
)
def test_ratio_one_equals_plain_sglang_with_the_same_host_pool(start_server, document_ids, tokenizer, variant):
    flags = FLAGS + VARIANTS[variant]
    times = 2 if "write_through_selective" in flags else 1
    plain = converse(start_server(*flags), document_ids, tokenizer, times)
    server = start_server(*flags, *SOFT_TOKENS, "--metasoft-ratio", "1", env=inside_env())
    state = server.info()["internal_states"][0]["metasoft"]
    assert state["keep_raw"] == ("write_back" not in flags)
    ours = converse(server, document_ids, tokenizer, times)
    assert outputs(ours) == outputs(plain)
    for turn in ours[1:]:
        for response in turn:
            meta = response["meta_info"]
            assert metasoft(response)["reused_tokens"] >= PROMPT_TOKENS - WINDOW - 64  # whole pages
            assert from_host(response) + meta["cached_tokens_details"]["device"] == meta["cached_tokens"]
    loaded = counters(server)["load_back_tokens_total"]
    assert loaded > 2 * PROMPT_TOKENS, "hardly anything was loaded"
    assert_sound_after_all(server)
    assert_pool_is_whole(server, POOL_TOKENS)


@pytest.fixture(scope="module")
def server(start_server):
    """At ratio 4, on which SGLang's and our checks watch."""
    return start_server(*FLAGS, *SOFT_TOKENS, "--admin-api-key", ADMIN["Authorization"][7:], env=inside_env())


@pytest.fixture
def evict(server, document_ids):
    """Push everything out of the device pool by prompts that are not compressed, and leave no trace in it."""

    def call() -> None:
        for number in range(4):
            ids = document_ids[700 * number :][:1200][::-1]
            server.generate(ids, 1, custom_params={"metasoft_ratio": 1}, extra_key="other")

    return call


def ask(server, ids: list[int], rid: str | None = None, **fields) -> dict:
    """As ``server.generate``; a request that is never let in is an error after two minutes."""
    sampling = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    body: dict = {"input_ids": ids, "sampling_params": sampling} | ({"rid": rid} if rid else {}) | fields
    response = requests.post(f"{server.url}/generate", json=body, timeout=120)
    assert response.status_code == 200, response.text
    return response.json()


def counters(server) -> dict[str, float]:
    """SGLang's and ours, without the prefix."""
    return {name.removeprefix("sglang:"): value for name, value in server.metrics(priority="").items()}


def test_entries_come_back_from_the_host_as_they_were(server, document_ids, evict):
    """The plugin compares each prefix's entries with those that were committed, on every check."""
    prompts = prompts_of(document_ids)
    for ids in prompts:
        assert metasoft(ask(server, ids))["span_tokens"] == PROMPT_TOKENS - WINDOW
    assert_sound_after_all(server)
    evict()
    assert_sound_after_all(server)  # notes what is away
    for ids in prompts:
        response = ask(server, ids)
        assert metasoft(response)["reused_tokens"] == PROMPT_TOKENS - WINDOW
        assert from_host(response) == response["meta_info"]["cached_tokens"] == PROMPT_TOKENS - 1
    after = counters(server)
    assert after["load_back_tokens_total"] <= CHATS * ((PROMPT_TOKENS - WINDOW) // 4 + WINDOW)
    assert after["metasoft_reused_host_tokens_total"] == CHATS * (PROMPT_TOKENS - WINDOW)
    assert_sound_after_all(server)
    assert "returned=3" in inside_lines(server, "ok")[-1]


def test_raw_twins_are_not_copied_to_the_host(server, document_ids):
    before = counters(server)["hicache_backup_tokens_total"]
    ids = document_ids[3000 : 3000 + PROMPT_TOKENS]
    assert metasoft(ask(server, ids))["span_tokens"] == PROMPT_TOKENS - WINDOW
    assert_sound_after_all(server)
    copied = counters(server)["hicache_backup_tokens_total"] - before
    assert copied <= (PROMPT_TOKENS - WINDOW) // 4 + WINDOW + 2 * NEW_TOKENS


def test_a_load_that_is_declined_costs_a_prefill_and_nothing_else(server, document_ids, evict):
    ids = document_ids[2000 : 2000 + PROMPT_TOKENS]
    first = ask(server, ids, extra_key="declined")
    evict()
    before = counters(server)["metasoft_declined_load_backs_total"]
    declined = ask(server, ids, rid="inside-decline", extra_key="declined")
    assert metasoft(declined) == metasoft(first) and declined["output_ids"] == first["output_ids"]
    assert from_host(declined) == 0
    assert counters(server)["metasoft_declined_load_backs_total"] == before + 1
    again = ask(server, ids, extra_key="declined")
    assert metasoft(again)["reused_tokens"] == PROMPT_TOKENS - WINDOW
    assert_sound_after_all(server)


def test_what_lies_on_the_host_is_its_tenants(server, document_ids, evict):
    ids = document_ids[1000 : 1000 + PROMPT_TOKENS]
    ask(server, ids, cache_salt="a")
    evict()
    other = ask(server, ids, cache_salt="b")
    assert metasoft(other)["reused_tokens"] == other["meta_info"]["cached_tokens"] == 0
    assert from_host(ask(server, ids, cache_salt="a")) == PROMPT_TOKENS - 1


def test_storage_cannot_be_attached_while_the_server_runs(server):
    url, body = f"{server.url}/hicache/storage-backend", {"hicache_storage_backend": "file"}
    response = requests.put(url, json=body, headers=ADMIN, timeout=60)
    assert response.status_code == 400 and "cannot run with HiCache storage" in response.text, response.text


def test_a_flush_empties_the_host_too(server, document_ids):
    assert requests.post(f"{server.url}/flush_cache", headers=ADMIN, timeout=60).status_code == 200
    response = ask(server, prompts_of(document_ids)[0])
    assert metasoft(response)["reused_tokens"] == response["meta_info"]["cached_tokens"] == 0
    assert_pool_is_whole(server, POOL_TOKENS)
    assert counters(server)["hicache_host_used_tokens"] < PROMPT_TOKENS // 2
