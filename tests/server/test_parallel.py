"""Tensor parallel: the same text as one process. Data parallel: every replica has an index of its own."""

import json

import pytest

from tests.server.checks import SOFT_TOKENS, STRICT_CHECKS, assert_pool_is_whole, metasoft

pytestmark = [pytest.mark.server, pytest.mark.slow]

POOL_TOKENS, WINDOW = 8192, 64
FLAGS = [*SOFT_TOKENS, "--enable-metrics", "--max-total-tokens", str(POOL_TOKENS), "--dtype", "float32"]


def talk(server, document_ids) -> list[dict]:
    """A document, a second turn, and another question about the document."""
    document = document_ids[:1200]
    first = server.generate(document + document_ids[2000:2100], 24)
    second = server.generate(document + document_ids[2000:2100] + first["output_ids"] + document_ids[2300:2330], 24)
    other = server.generate(document + document_ids[2500:2600], 24)
    return [first, second, other, server.generate(document + document_ids[2700:2800], 24)]


@pytest.mark.parametrize("consolidation", ["attention_flow", "key_bias"])
def test_three_tensor_parallel_ranks_answer_like_one(start_server, document_ids, consolidation):
    """Each rank holds one of the three KV heads."""
    flags = [*FLAGS, "--metasoft-config", json.dumps({"consolidation": consolidation})]
    one = talk(start_server(*flags, env=STRICT_CHECKS), document_ids)
    server = start_server(*flags, "--tp-size", "3", env=STRICT_CHECKS)
    three = talk(server, document_ids)
    assert [response["output_ids"] for response in three] == [response["output_ids"] for response in one]
    assert [metasoft(response) for response in three] == [metasoft(response) for response in one]
    assert metasoft(three[3])["reused_tokens"] == 1200
    assert_pool_is_whole(server, POOL_TOKENS)


def test_two_data_parallel_replicas_each_have_their_index(start_server, document_ids):
    server = start_server(*FLAGS, "--dp-size", "2", "--load-balance-method", "round_robin")
    ids = document_ids[:1000]
    replicas = [server.generate(ids, 4, routed_dp_rank=rank)["meta_info"] for rank in (0, 1, 0, 1)]
    assert [meta["dp_rank"] for meta in replicas] == [0, 1, 0, 1]
    assert [meta["metasoft_reused_tokens"] for meta in replicas] == [0, 0, 1000 - WINDOW, 1000 - WINDOW]
