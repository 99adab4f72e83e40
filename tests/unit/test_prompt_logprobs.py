"""Log-probabilities of prompt tokens: no span reaches the first of them, so SGLang finds every id in the raw tail."""

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("sglang")
from metasoft_patches.scheduler.hooks import SchedulerHooks
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.scheduler_components.logprob_result_processor import SchedulerLogprobResultProcessor

from sglang_metasoft.config import MetaSoftConfig
from sglang_metasoft.types import Bypass
from tests.unit.sglang_requests import make_prefix, make_request

MODEL = SimpleNamespace(vocab_size=49152)
RUNNER = SimpleNamespace(lora_manager=None)
SCHEDULER = SimpleNamespace(model_config=MODEL, tp_worker=SimpleNamespace(model_runner=RUNNER))
WINDOW = 64


@pytest.fixture(autouse=True, scope="module")
def published_settings():
    """Whether a request has no output, which SGLang asks its published settings for too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Req, "is_prefill_only", False)
        yield


def make_hooks(config: MetaSoftConfig) -> SchedulerHooks:
    """Those of a server whose weights fit."""
    hooks = SchedulerHooks(config, adapter=None)
    hooks.compressor = SimpleNamespace(stages=SimpleNamespace(unfit=None, is_stale=False), sliding_window_tokens=None)
    return hooks


def arrive(config: MetaSoftConfig, prompt_tokens: int, start: int, options: dict):
    """A request for log-probabilities from ``start`` on, as the scheduler has it after its arrival."""
    req = make_request(prompt_tokens, options, return_logprob=True)
    recv_req = SimpleNamespace(return_logprob=True, logprob_start_len=start)
    make_hooks(config).request_made(req, SCHEDULER, recv_req)
    req.logprob_start_len = start  # which SGLang sets later
    return req


def compress(req, config: MetaSoftConfig, page_size: int, ends: list[int], boundary: int | None) -> int:
    """Compress what may be after each chunk, as the scheduler does; returns how many spans there were."""
    state, spans = req.metasoft, 0
    if boundary is not None and state.named_boundary is None:
        state.boundary_tokens = boundary  # seen in the tree
    for end in ends:
        state.make_plan(config, page_size, end)
        while state.plan is not None:
            before = state.compressed or make_prefix(0, 0)
            prefix = make_prefix(before.tokens + state.plan.span_tokens, before.slots + state.plan.kept_slots)
            req.origin_input_ids = state.set_compressed(req, prefix)
            spans += 1
            state.make_plan(config, page_size, end)
    return spans


def returned_ids(req, start: int) -> list[int]:
    """SGLang's answer to the request: the ids that it returns with the log-probabilities."""
    count = req.metasoft.prompt_ids[start:]
    processor = SchedulerLogprobResultProcessor(model_config=MODEL)
    output = SimpleNamespace(input_token_logprobs=tuple(-1.0 for _ in count))
    processor.add_input_logprob_return_values(0, req, output, 0, len(count), last_prefill_chunk=True)
    return req.logprob.input_token_logprobs_idx


@pytest.mark.parametrize(
    ("prompt_tokens", "start", "boundary", "options", "ratio", "span"),
    [
        (600, 540, 570, {}, 4, 540),
        (600, 540, None, {"metasoft_boundary": 599}, 4, 540),
        (600, 540, 570, {"metasoft_budget": 80}, 4, 540),
        (1000, 936, None, {"metasoft_ratio": 40, "metasoft_boundary": 999}, 4, 936),
        (700, 636, 660, {}, 32, 636),
        (600, 560, 530, {}, 4, 530),  # a boundary before it is kept to
    ],
)
def test_a_boundary_in_the_window_gives_way(prompt_tokens, start, boundary, options, ratio, span):
    config = MetaSoftConfig(ratio=ratio)
    req = arrive(config, prompt_tokens, start, options)
    assert compress(req, config, 1, [prompt_tokens], boundary) == 1 and req.metasoft.compressed.tokens == span
    assert returned_ids(req, start) == list(req.metasoft.prompt_ids[start:])


def test_what_is_asked_for_before_the_window_stays_raw():
    req = arrive(MetaSoftConfig(), 1000, 1000 - WINDOW - 1, {})
    assert req.metasoft.bypass is Bypass.PROMPT_LOGPROBS


@pytest.mark.parametrize("field", ["token_indices_to_pool", "multi_item_delimiter_indices"])
def test_scores_at_named_places_of_the_prompt_leave_it_raw(field):
    req = make_request(1000, return_logprob=True, **{field: [990]})
    recv_req = SimpleNamespace(return_logprob=True, logprob_start_len=-1)
    make_hooks(MetaSoftConfig()).request_made(req, SCHEDULER, recv_req)
    assert req.metasoft.bypass is Bypass.PROMPT_LOGPROBS


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_every_returned_id_is_the_prompts_own(data):
    draw = data.draw
    prompt_tokens = draw(st.integers(WINDOW + 1, 4000), "prompt")
    start = draw(st.integers(prompt_tokens - WINDOW, prompt_tokens - 1), "start")
    page_size = draw(st.sampled_from([1, 16, 64]), "page")
    chunk = draw(st.sampled_from([100, 512, 5000]), "chunk")
    boundary = draw(st.none() | st.integers(1, prompt_tokens - 1), "boundary")
    options = draw(
        st.just({})
        | st.builds(lambda ratio: {"metasoft_ratio": ratio}, st.floats(1.1, 1000))
        | st.builds(lambda budget: {"metasoft_budget": budget}, st.integers(2, 2000)),
        "options",
    )
    if boundary is not None and draw(st.booleans(), "named"):
        options = options | {"metasoft_boundary": boundary}
    config = MetaSoftConfig(ratio=draw(st.sampled_from([1, 2, 4, 32]), "ratio"), min_tokens=128)
    req = arrive(config, prompt_tokens, start, options)
    ends = [*range(chunk, prompt_tokens, chunk), prompt_tokens]
    spans = compress(req, config, page_size, ends, boundary)
    assert not spans or req.metasoft.compressed.tokens <= start
    assert returned_ids(req, start) == list(req.metasoft.prompt_ids[start:])
