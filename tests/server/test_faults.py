"""A fault while compressing: the request is served uncompressed, the reason reported, and nothing leaks."""

import json

import pytest

from tests.server.checks import STRICT_CHECKS, assert_pool_is_whole, metasoft

pytestmark = pytest.mark.server

POOL_TOKENS = 8192


def test_a_fault_leaves_the_request_uncompressed(start_server, document_ids, tmp_path):
    """The trace folder is a file, so every compression fails after its entries were written, before the commit."""
    blocked = tmp_path / "file"
    blocked.touch()
    server = start_server(
        "--enable-metasoft", "--enable-metrics", "--max-total-tokens", str(POOL_TOKENS),
        "--metasoft-config", json.dumps({"trace_dir": str(blocked)}), env=STRICT_CHECKS,
    )  # fmt: skip
    ids = document_ids[:1200]
    response = server.generate(ids, 12)
    assert metasoft(response) == {"span_tokens": 0, "kv_tokens": 1200, "reused_tokens": 0, "bypass": "fault"}
    again = server.generate(ids, 12, custom_params={"metasoft_ratio": 1})
    assert response["output_ids"] == again["output_ids"]
    assert again["meta_info"]["cached_tokens"] > 1100, "the raw entries of a failed compression stay shared"
    assert_pool_is_whole(server, POOL_TOKENS, expects_faults=True)
