"""One tenant tries to reach another's compressed entries."""

from array import array

import pytest
import requests
from metasoft_patches.cache.prefix_index import FIRST_VIRTUAL_ID, make_virtual_ids

from tests.server.checks import SALT, SOFT_TOKENS, STRICT_CHECKS, assert_pool_is_whole, metasoft

pytestmark = pytest.mark.server

POOL_TOKENS, WINDOW = 12288, 64


@pytest.fixture(scope="module")
def server(start_server):
    flags = [*SOFT_TOKENS, "--enable-metrics", "--max-total-tokens", str(POOL_TOKENS)]
    return start_server(*flags, env=STRICT_CHECKS)


@pytest.mark.parametrize(("key", "start"), [(SALT, 0), ("extra_key", 10)], ids=["salt", "extra_key"])
def test_the_same_prompt_under_other_keys_finds_nothing(server, document_ids, key, start):
    ids, victim = document_ids[start : start + 1000], {key: "victim"}
    server.generate(ids, **victim)
    assert metasoft(server.generate(ids, **victim))["reused_tokens"] == 1000 - WINDOW
    for other in ({SALT: "attacker"}, {"extra_key": "intruder"}, {SALT: "Victim"}):
        response = server.generate(ids, **other)
        assert (metasoft(response)["reused_tokens"], response["meta_info"]["cached_tokens"]) == (0, 0)


def test_where_another_tenants_prompts_branch_is_not_told(server, document_ids):
    """The end of a segment would show how much of a prompt somebody else has sent before."""
    document = document_ids[20:1520]
    for number in range(2):
        server.generate(document + document_ids[3000 + 100 * number :][:100], **{SALT: "victim"})
    response = server.generate(document + document_ids[3300:3400], **{SALT: "attacker"})
    assert metasoft(response)["span_tokens"] == 1600 - WINDOW


def test_virtual_ids_cannot_be_sent(server, document_ids):
    """With any id outside the vocabulary SGLang refuses a request, so that nobody can even try to guess them."""
    ids = document_ids[30:1030]
    server.generate(ids)
    guess = list(make_virtual_ids("00" * 16, ("guess",), None, array("q", ids), array("q"), 10))
    for bad in ([FIRST_VIRTUAL_ID], guess, [-1], [49152], [(1 << 63) - 1]):
        body = {"input_ids": bad + ids[-100:], "sampling_params": {"max_new_tokens": 2}}
        response = requests.post(f"{server.url}/generate", json=body, timeout=60)
        assert response.status_code == 400, response.text
    assert metasoft(server.generate(ids))["reused_tokens"] == 1000 - WINDOW
    assert_pool_is_whole(server, POOL_TOKENS)
