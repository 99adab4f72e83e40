"""The plan follows from lengths alone."""

import itertools

import pytest

from sglang_metasoft.config import MetaSoftConfig
from sglang_metasoft.policy import plan_span
from sglang_metasoft.types import Bypass, Plan


def plan(tokens, page=1, options=None, **settings):
    chain = {name: settings.pop(name) for name in ("chain_tokens", "chain_slots") if name in settings}
    return plan_span(MetaSoftConfig(**settings), prompt_tokens=tokens, page_size=page, options=options, **chain)


def test_ratio_counts_the_window_as_kept():
    assert plan(2048) == Plan(start_slots=0, span_tokens=1984, kept_slots=2048 // 4 - 64, sink_tokens=4)


def test_a_short_span_stays_raw():
    assert plan(575) is Bypass.TOO_SHORT
    assert isinstance(plan(576), Plan)


@pytest.mark.parametrize(
    ("tokens", "page", "ratio"), list(itertools.product([600, 1000, 4097, 32768], [1, 16, 64], [1.5, 4, 8, 100]))
)
def test_span_and_kept_are_whole_pages_and_kept_entries_meet_the_ratio(tokens, page, ratio):
    result = plan(tokens, page, ratio=ratio)
    assert result.span_tokens % page == 0 and result.kept_slots % page == 0
    assert 64 <= tokens - result.span_tokens < 64 + page
    assert result.sink_tokens <= result.kept_slots <= result.span_tokens
    held = result.kept_slots + tokens - result.span_tokens
    assert held >= tokens / ratio
    assert held < max(tokens / ratio, 64 + page + 16) + page + 1


def test_ratio_one_keeps_everything_but_still_runs():
    assert plan(2000, ratio=1) == Plan(0, 1936, 1936, 4)


def test_a_budget_overrides_the_ratio_and_a_request_overrides_both():
    assert plan(2000, budget=300).kept_slots == 300 - 64
    assert plan(2000, budget=300, options={"ratio": 2}).kept_slots == 1000 - 64
    assert plan(2000, options={"budget": 200}).kept_slots == 200 - 64


def test_a_budget_larger_than_the_prompt_drops_nothing():
    assert plan(2000, budget=5000) is Bypass.NOTHING_TO_DROP


@pytest.mark.parametrize("options", [{"ratio": 1}, {"ratio": 1.0}, {"budget": 1}])
def test_one_means_do_not_compress(options):
    assert plan(2000, options=options) is Bypass.OPTED_OUT


def test_a_later_segment_starts_after_the_chain_and_gets_its_share():
    first = plan(2048, page=16)
    result = plan(4096, page=16, chain_tokens=first.span_tokens, chain_slots=first.kept_slots)
    assert result.start_slots == first.kept_slots
    assert first.span_tokens + result.span_tokens == 4096 - 64
    assert first.kept_slots + result.kept_slots + 64 == 4096 // 4
    assert result.sink_tokens == 0


def test_a_short_continuation_is_no_segment_yet():
    assert plan(2300, chain_tokens=1984, chain_slots=448) is Bypass.TOO_SHORT
