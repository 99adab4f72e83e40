"""The plan follows from lengths alone."""

import itertools

import pytest

from sglang_metasoft.config import MetaSoftConfig
from sglang_metasoft.pipeline.plan import chunked_footprint, plan_span
from sglang_metasoft.types import Bypass, Plan


def plan(tokens, page=1, options=None, **settings):
    names = ("whole_tokens", "compressed_tokens", "compressed_slots", "boundary_tokens", "sliding_window_tokens")
    prefix = {name: settings.pop(name) for name in names if name in settings}
    return plan_span(MetaSoftConfig(**settings), prompt_tokens=tokens, page_size=page, options=options, **prefix)


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


@pytest.mark.parametrize("page", [1, 16])
@pytest.mark.parametrize("tokens", [2000, 130_000])
def test_with_a_budget_that_no_prompt_reaches_only_those_are_compressed_that_ask(tokens, page):
    """docs/rollout.md: --metasoft-budget 1000000000."""
    assert plan(tokens, page, budget=10**9) is Bypass.NOTHING_TO_DROP
    assert plan(tokens, page, budget=10**9, boundary_tokens=1000) is Bypass.NOTHING_TO_DROP
    for options in ({"ratio": 4}, {"budget": 600}):
        assert plan(tokens, page, budget=10**9, options=options) == plan(tokens, page, options=options)
        assert isinstance(plan(tokens, page, options=options), Plan)
    config = MetaSoftConfig(budget=10**9, during_prefill=True)
    raw = chunked_footprint(config, prompt_tokens=tokens, chunk_tokens=512, page_size=page)
    assert raw == (tokens, tokens)


@pytest.mark.parametrize("options", [{"ratio": 1}, {"ratio": 1.0}, {"budget": 1}])
def test_one_means_do_not_compress(options):
    assert plan(2000, options=options) is Bypass.OPTED_OUT


def test_a_later_segment_starts_after_the_prefix_and_gets_its_share():
    first = plan(2048, page=16)
    result = plan(4096, page=16, compressed_tokens=first.span_tokens, compressed_slots=first.kept_slots)
    assert result.start_slots == first.kept_slots
    assert first.span_tokens + result.span_tokens == 4096 - 64
    assert first.kept_slots + result.kept_slots + 64 == 4096 // 4
    assert result.sink_tokens == 0


def test_a_short_continuation_is_no_segment_yet():
    assert plan(2300, compressed_tokens=1984, compressed_slots=448) is Bypass.TOO_SHORT


def test_a_boundary_ends_the_span_there_and_its_entries_do_not_depend_on_what_follows():
    plans = {plan(tokens, boundary_tokens=2000) for tokens in (2001, 2030, 2600, 9000)}
    assert plans == {Plan(start_slots=0, span_tokens=2000, kept_slots=500, sink_tokens=4, ends_at_boundary=True)}


def whole_plan(config, tokens, page, boundary=None, chunk=None, options=None):
    """All spans of a prompt, as the compressor makes them: after each chunk, or at the end."""
    spans, compressed_tokens, compressed_slots = [], 0, 0
    for computed in [*range(chunk or tokens, tokens, chunk or tokens), tokens]:
        while isinstance(
            span := plan_span(
                config, prompt_tokens=computed, whole_tokens=tokens, page_size=page, boundary_tokens=boundary,
                compressed_tokens=compressed_tokens, compressed_slots=compressed_slots, options=options,
            ),
            Plan,
        ):  # fmt: skip
            spans.append(span)
            compressed_tokens, compressed_slots = (
                compressed_tokens + span.span_tokens,
                compressed_slots + span.kept_slots,
            )
    return spans, compressed_tokens, compressed_slots


@pytest.mark.parametrize("page", [1, 16])
@pytest.mark.parametrize("chunk", [None, 512, 1000])
@pytest.mark.parametrize("boundary", [None, 850, 1500])
@pytest.mark.parametrize("tokens", [863, 1501, 1570, 2300, 8000])
@pytest.mark.parametrize("budget", [100, 333, 700])
def test_a_prompt_holds_its_budget_to_a_page_for_each_span(tokens, page, chunk, boundary, budget):
    config = MetaSoftConfig(min_tokens=256)
    boundary = boundary if boundary and boundary < tokens else None
    spans, compressed_tokens, compressed_slots = whole_plan(config, tokens, page, boundary, chunk, {"budget": budget})
    raw = tokens - compressed_tokens
    held = compressed_slots + raw
    least = raw + sum(-(-16 // page) * page for _ in spans)  # each span keeps some, and what is too short stays raw
    # Chunks end where they do: earlier ones cannot know that the last leaves a rest which is too short.
    unforeseen = config.min_tokens if chunk else 0
    rounding = len(spans) * page + (16 if budget < 2 * least else 0)
    assert held <= max(budget, least) + unforeseen + rounding, spans
    if spans and budget > least:
        assert held >= budget


def test_the_budget_at_a_boundary_counts_what_stays_raw_behind_it():
    """863 tokens, 13 of them after the boundary: no window is held back for them."""
    assert plan(863, boundary_tokens=850, options={"budget": 100}, min_tokens=256).kept_slots == 100 - 13
    # What follows is a span of its own, and both get their share.
    both = whole_plan(MetaSoftConfig(), 3000, 1, 2000, None, {"budget": 300})
    assert [span.kept_slots for span in both[0]] == [161, 75] and both[2] + 64 == 300


def test_a_growing_chat_with_a_budget_gives_later_segments_the_share_that_a_prompt_of_that_length_gets():
    config, compressed_tokens, compressed_slots, shares = MetaSoftConfig(budget=264), 0, 0, []
    for tokens in range(2000, 10_001, 2000):
        span = plan_span(
            config, prompt_tokens=tokens, page_size=1,
            compressed_tokens=compressed_tokens, compressed_slots=compressed_slots,
            reused_tokens=compressed_tokens, reused_slots=compressed_slots,
        )  # fmt: skip
        shares.append(span.kept_slots)
        assert span.kept_slots == -(-span.span_tokens * 200 // (tokens - 64))
        compressed_tokens, compressed_slots = compressed_tokens + span.span_tokens, compressed_slots + span.kept_slots
    assert shares == [200, 102, 68, 51, 41]


@pytest.mark.parametrize("budget", [2, 16, 79])
def test_the_smallest_budget_is_the_window_and_a_few_entries(budget):
    assert plan(2000, options={"budget": budget}) == plan(2000, budget=80) == Plan(0, 1936, 16, 4)


def test_what_follows_a_boundary_is_a_span_of_its_own():
    rest = plan(3000, boundary_tokens=2000, compressed_tokens=2000, compressed_slots=500)
    assert rest == Plan(500, 1000 - 64, 3000 // 4 - 64 - 500, 0)
    assert plan(2100, boundary_tokens=2000, compressed_tokens=2000, compressed_slots=500) is Bypass.TOO_SHORT


@pytest.mark.parametrize("boundary", [1, 511])
def test_a_boundary_too_near_is_no_boundary(boundary):
    assert plan(2048, boundary_tokens=boundary) == plan(2048)


def test_a_chunk_leaves_no_rest_before_a_boundary_that_would_be_too_short():
    """2,000 - (1,600 - 64) = 464 tokens would be left: the next chunk takes them all."""
    assert plan(1600, boundary_tokens=2000) is Bypass.TOO_SHORT
    assert plan(1500, boundary_tokens=2000).span_tokens == 1500 - 64
    assert plan(2112, boundary_tokens=2000).span_tokens == 2000


@pytest.mark.parametrize("tokens", [600, 5000, 8191])
@pytest.mark.parametrize("page", [1, 64])
def test_the_footprint_of_a_prompt_that_is_compressed_chunk_by_chunk(tokens, page):
    config = MetaSoftConfig(min_tokens=128)
    result = chunked_footprint(config, prompt_tokens=tokens, chunk_tokens=256, page_size=page)
    assert tokens / 4 <= result.final_slots <= tokens / 4 + 64 + 128 + 2 * page + 16
    assert result.final_slots <= result.peak_slots <= result.final_slots + 256 + 128 + 64
    raw = chunked_footprint(config, prompt_tokens=tokens, chunk_tokens=256, page_size=page, options={"ratio": 1})
    assert raw == (tokens, tokens)


def test_a_raw_prefix_counts_until_it_is_compressed():
    config = MetaSoftConfig(ratio=4, during_prefill=True, min_tokens=128)
    result = chunked_footprint(config, prompt_tokens=4096, chunk_tokens=256, page_size=16, raw_tokens=2048)
    assert 2304 * 1.2 < result.peak_slots <= 2304 * 1.25 + 16
    assert result.final_slots <= 4096 / 4 + 64 + 128 + 48


WINDOWED = list(itertools.product([2, 512, 1024, 4096], [1, 16, 64], [{"ratio": 1.5}, {"ratio": 100}, {"budget": 90}]))


@pytest.mark.parametrize(("window", "page", "options"), WINDOWED, ids=str)
@pytest.mark.parametrize("tokens", [700, 2200, 20_000])
def test_a_span_leaves_a_whole_window_for_what_follows_it(tokens, window, page, options):
    found = plan(tokens, page, sliding_window_tokens=window, options=options)
    plain = plan(tokens, page, options=options)
    if not isinstance(found, Plan):
        assert found is Bypass.SLIDING_WINDOW and plain.span_tokens < 2 * (window - 1)
        return
    assert found.kept_slots >= window - 1 and found.span_tokens >= 2 * (window - 1)
    least = -(-(window - 1) // page) * page
    assert found == plain._replace(kept_slots=max(plain.kept_slots, least))


def test_without_windows_a_chunk_waits_for_no_other():
    """Whatever earlier chunks were left with: 16 entries are kept of the next one."""
    found = plan(1600, ratio=100, whole_tokens=5000, compressed_tokens=1000, compressed_slots=900)
    assert found == Plan(900, 536, 16, 0)
    lengths = dict(whole_tokens=9000, compressed_tokens=1000, compressed_slots=900, sliding_window_tokens=200)
    assert plan(1600, ratio=100, **lengths) is Bypass.SLIDING_WINDOW


def test_a_window_is_no_reason_where_all_is_kept_or_too_little_is_there():
    assert plan(2000, ratio=1, sliding_window_tokens=4096) == plan(2000, ratio=1)
    assert plan(575, sliding_window_tokens=4096) is Bypass.TOO_SHORT
    assert plan(576, sliding_window_tokens=4096) is Bypass.SLIDING_WINDOW
    assert plan(64 + 2046, sliding_window_tokens=1024).kept_slots == 1023
    assert plan(64 + 2045, sliding_window_tokens=1024) is Bypass.SLIDING_WINDOW


def test_a_boundary_of_less_than_two_windows_is_none():
    """The document and its question become one span; else nothing of them would be compressed."""
    found = plan(9000, boundary_tokens=1500, sliding_window_tokens=1024)
    assert found == plan(9000, sliding_window_tokens=1024) and not found.ends_at_boundary
    found = plan(9000, boundary_tokens=3000, sliding_window_tokens=1024)
    assert found == Plan(0, 3000, 1023, 4, ends_at_boundary=True)


@pytest.mark.parametrize("page", [1, 16])
@pytest.mark.parametrize("chunk", [512, 2048, 8192])
@pytest.mark.parametrize("window", [None, 1024, 4096])
def test_chunks_hold_what_the_ratio_says_whatever_the_window(window, chunk, page):
    """A span of a chunk waits for further ones until the ratio itself leaves a window of entries."""
    config, tokens, compressed, held = MetaSoftConfig(during_prefill=True), 60_000, 0, 0
    lengths = dict(chunk_tokens=chunk, page_size=page, sliding_window_tokens=window)
    footprint = chunked_footprint(config, prompt_tokens=tokens, **lengths)
    for computed in [*range(chunk, tokens, chunk), tokens]:
        span = plan_span(
            config, prompt_tokens=computed, page_size=page, whole_tokens=tokens, compressed_tokens=compressed,
            compressed_slots=held, sliding_window_tokens=window,
        )  # fmt: skip
        if isinstance(span, Plan):
            assert span.kept_slots >= (window or 1) - 1
            compressed, held = compressed + span.span_tokens, held + span.kept_slots
    assert footprint.final_slots == held + tokens - compressed
    rest = 0 if window is None else 2 * window + max(0, 4096 + 64 - tokens % chunk)
    assert footprint.final_slots <= tokens / 4 + rest + 80 * page
    assert footprint.peak_slots <= tokens / 4 + 5 * (window or 1) + 2 * chunk + 80 * page
