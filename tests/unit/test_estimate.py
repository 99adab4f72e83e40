"""How many prompts fit: against a slot-by-slot filling of the pool, and the figures of docs/performance.md."""

import pytest

from sglang_metasoft.config import MetaSoftConfig
from sglang_metasoft.pipeline.estimate import fit_compressed, fit_raw
from sglang_metasoft.pipeline.plan import plan_span

REQUEST = dict(prompt_tokens=2048, output_tokens=16)


def fit(ratio, pool=8288, chunk_tokens=512, **lengths):
    return fit_compressed(MetaSoftConfig(), ratio, pool_tokens=pool, chunk_tokens=chunk_tokens, **(REQUEST | lengths))


@pytest.mark.parametrize("pool", [100, 2063, 2064, 2600, 8288, 100_000])
@pytest.mark.parametrize("ratio", [2, 4, 16])
def test_requests_are_those_that_fill_the_pool_one_by_one(pool, ratio):
    plan = plan_span(MetaSoftConfig(ratio=ratio), prompt_tokens=2048, page_size=1)
    free, count = pool, 0
    while free >= 2048 + plan.kept_slots + 16:
        free -= 2048 - plan.saved_slots + 16
        count += 1
    assert fit(ratio, pool).requests == count


def test_plain_requests_are_whole_ones():
    assert [fit_raw(pool, 2048, 16) for pool in (2063, 2064, 8288)] == [0, 1, 4]


def test_compression_during_prefill_fits_what_was_measured():
    """docs/performance.md, "Memory": 4 raw, 15 with chunks of 512 at the same time; an estimate may be lower by one."""
    assert fit(4).requests_during_prefill in (14, 15)


def test_a_prompt_longer_than_the_pool_fits_only_during_prefill():
    found = fit(8, pool=2560, prompt_tokens=7680)
    assert found.requests == 0 and found.requests_during_prefill >= 1


def test_a_prompt_that_is_not_compressed_says_why():
    found = fit(4, prompt_tokens=500)
    assert found.bypass == "too_short" and found.requests == found.requests_during_prefill == 8288 // 516
    assert found.prompt_entries == 500
