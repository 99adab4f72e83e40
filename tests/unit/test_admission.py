"""Room set aside for consolidated entries, and a prompt that is ended because there is none."""

from types import SimpleNamespace

import pytest

pytest.importorskip("sglang")
from metasoft_patches.adapter import load_adapter
from metasoft_patches.scheduler.admission import Admission
from metasoft_patches.scheduler.chunked_prefill import ChunkedPrefillGuard

from sglang_metasoft.config import MetaSoftConfig
from sglang_metasoft.types import Bypass, BypassLifetime
from tests.unit.sglang_requests import make_prefix, make_request

CONTEXT = 131_072


@pytest.mark.parametrize("max_tokens", [None, 512])
@pytest.mark.parametrize(("pool", "prompt"), [(30_000, 8_000), (100_000, 32_000), (400_000, 32_000)])
def test_room_is_set_aside_whether_or_not_a_client_names_max_tokens(pool, prompt, max_tokens):
    """SGLang gives a client that names none all that the pool has left, but counts on ``CLIP_MAX_NEW_TOKENS`` of it."""
    req = make_request(prompt)
    req.refresh_fill_ids()
    req.sampling_params.max_new_tokens = min(max_tokens or 1 << 30, CONTEXT - prompt - 2, pool - prompt - 2)
    req.metasoft.make_plan(MetaSoftConfig(), 1)
    scheduler = SimpleNamespace(
        page_size=1, chunked_prefill_size=8192, max_total_num_tokens=pool, max_req_input_len=min(CONTEXT, pool) - 6
    )
    admission = Admission(scheduler, MetaSoftConfig(), load_adapter())
    assert admission.reserve_slots(req, is_admission=True) == req.metasoft.plan.kept_slots > 0


@pytest.mark.parametrize("failure", [None, Bypass.FAULT])
def test_a_prompt_that_is_ended_is_not_planned_any_more(failure):
    """One more token of it runs: a plan for the whole prompt would reach past the end of its row."""
    req, config = make_request(4000), MetaSoftConfig(during_prefill=True)
    state = req.metasoft
    state.use_prefix(req, make_prefix(2000, 500))
    if failure:
        state.set_bypass(failure, BypassLifetime.CHUNK)
    req.refresh_fill_ids()
    req.prefix_len = 2306 - state.offset
    state.make_plan(config, 1)
    assert state.plan.end_slots > req.prefix_len + 1
    ChunkedPrefillGuard(scheduler=None, adapter=load_adapter())._end(req)
    assert len(req.full_untruncated_fill_ids) == req.prefix_len + 1 and req.to_finish.status_code == 503
    for tokens in (None, 4000, 2307):
        state.make_plan(config, 1, tokens)
        assert state.plan is None
    assert state.bypass is (failure or Bypass.NO_FREE_SLOTS)
