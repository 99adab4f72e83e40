"""A pool that is too small: chunks, mixed batches, pages, forced retraction, aborts. Nothing is lost or leaks."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from tests.server.checks import SOFT_TOKENS, STRICT_CHECKS, assert_pool_is_whole, metasoft

pytestmark = pytest.mark.server

POOL_TOKENS = 3072
FLAGS = [
    *SOFT_TOKENS, "--enable-metrics", "--max-total-tokens", str(POOL_TOKENS),
    "--chunked-prefill-size", "256", "--enable-mixed-chunk",
]  # fmt: skip


# SGLang's own switch for testing: every 25th step retracts what it can.
FORCED_RETRACTION = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "25"}
VARIANTS = {
    "free-raw-page-1": ["--no-metasoft-keep-raw"],
    "keep-raw-snapkv-page-64": ["--metasoft-method", "snapkv", "--page-size", "64"],
    "during-prefill-page-16": [
        "--metasoft-during-prefill",
        "--metasoft-min-tokens",
        "128",
        "--page-size",
        "16",
        "--disable-overlap-schedule",
    ],  # fmt: skip
}


@pytest.mark.parametrize("variant", list(VARIANTS.values()), ids=list(VARIANTS))
def test_a_small_pool_serves_everything_and_leaks_nothing(start_server, document_ids, variant):
    server = start_server(*FLAGS, *variant, env=STRICT_CHECKS | FORCED_RETRACTION)
    source = random.Random(7)
    jobs = []
    for number in range(24):
        start = source.randrange(4) * 400
        length = source.choice([100, 700, 1000, 1400])
        jobs.append((number, document_ids[start : start + length], source.choice([8, 40, 120])))
    aborted = {3, 11, 17}

    def one(job):
        number, ids, new_tokens = job
        if number in aborted:
            threading.Timer(
                2 + number / 5, requests.post, [f"{server.url}/abort_request"], {"json": {"rid": f"r{number}"}}
            ).start()
        body = {"input_ids": ids, "rid": f"r{number}"}
        body["sampling_params"] = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
        return requests.post(f"{server.url}/generate", json=body, timeout=600)

    with ThreadPoolExecutor(10) as pool:
        responses = list(pool.map(one, jobs))
    compressed = retracted = 0
    for (number, ids, new_tokens), response in zip(jobs, responses, strict=True):
        if number in aborted:
            continue
        assert response.status_code == 200, response.text
        meta = response.json()["meta_info"]
        assert (meta["prompt_tokens"], meta["completion_tokens"]) == (len(ids), new_tokens)
        retracted += meta["num_retractions"]
        if len(ids) >= 700 and "metasoft_bypass" not in meta:
            compressed += 1
            assert metasoft(response.json())["kv_tokens"] < len(ids)
    assert compressed >= 8, "hardly anything was compressed"
    assert retracted > 0, "nothing was retracted"
    assert_pool_is_whole(server, POOL_TOKENS)
