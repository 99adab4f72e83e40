"""An fp8 KV cache: entries are read from fp8, consolidated, and written back to it."""

import pytest

from tests.server.checks import SOFT_TOKENS, STRICT_CHECKS, assert_pool_is_whole, metasoft
from tests.server.test_identity import converse, make_prompts, outputs

pytestmark = pytest.mark.server

POOL_TOKENS = 32_768
FLAGS = ["--dtype", "float32", "--kv-cache-dtype", "fp8_e4m3", "--max-total-tokens", str(POOL_TOKENS)]
METASOFT = [*SOFT_TOKENS, "--metasoft-ratio", "1", "--enable-metrics"]


def test_ratio_one_equals_plain_sglang_and_ratio_four_holds_a_quarter(start_server, document_ids, tokenizer):
    prompts = make_prompts(document_ids)[::4]
    plain = outputs(converse(start_server(*FLAGS), prompts, tokenizer))
    server = start_server(*FLAGS, *METASOFT, env=STRICT_CHECKS)
    assert outputs(converse(server, prompts, tokenizer)) == plain
    ids = document_ids[:2048]
    first, again = (server.generate(ids, 10, custom_params={"metasoft_ratio": 4}) for _ in range(2))
    assert metasoft(first)["kv_tokens"] == 512 and metasoft(again)["reused_tokens"] == 2048 - 64
    assert server.generate(ids, 10, custom_params={"metasoft_ratio": 4})["output_ids"] == again["output_ids"]
    assert_pool_is_whole(server, POOL_TOKENS)
