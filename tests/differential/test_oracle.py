"""The oracle must be able to say no: one change at a time to an answer of ours, and whether it is found."""

import copy

import pytest

from tests.differential.oracle import differences
from tests.differential.servers import Outcome
from tests.differential.streams import merge

SENT = {"input_ids": [1, 2, 3], "sampling_params": {"temperature": 0, "max_new_tokens": 2, "ignore_eos": True}}
STEP = {"path": "/generate", "body": SENT}
ANSWER = {
    "text": "ab", "output_ids": [7, 8],
    "meta_info": {
        "id": "x", "finish_reason": {"type": "length", "length": 2}, "prompt_tokens": 300, "completion_tokens": 2,
        "cached_tokens": 200, "e2e_latency": 0.5, "output_token_logprobs": [[-0.5, 7, None], [-1.0, 8, None]],
        "input_token_logprobs": [[None, 2, None], [-0.1, 3, None]],
    },
}  # fmt: skip


def found(path: str, value, keeps_all: bool, **meta) -> bool:
    """Whether the oracle minds that our answer has another value there."""
    body = copy.deepcopy(ANSWER)
    body["meta_info"] |= meta
    *parents, last = path.split("/")
    place = body
    for name in parents:
        place = place[int(name) if name.isdigit() else name]
    place[last] = value
    return bool(differences(STEP, Outcome(200, ANSWER, SENT), Outcome(200, body, SENT), keeps_all, True))


@pytest.mark.parametrize(
    ("path", "value", "at_ratio_one", "at_ratio_four"),
    [
        ("text", "ab", False, False),
        ("text", "ac", True, False),
        ("output_ids", [7, 9], True, False),
        ("meta_info/id", "y", False, False),
        ("meta_info/e2e_latency", 0.6, False, False),
        ("meta_info/new_field", 1, True, False),
        ("meta_info/prompt_tokens", 299, True, True),
        ("meta_info/completion_tokens", 3, True, True),
        ("meta_info/finish_reason", {"type": "stop"}, True, True),
        ("meta_info/cached_tokens", 199, False, False),
        ("meta_info/cached_tokens", 100, True, True),
        ("meta_info/cached_tokens", 201, True, True),
        ("meta_info/output_token_logprobs", [[-0.5, 7, None], [-1.0001, 8, None]], False, False),
        ("meta_info/output_token_logprobs", [[-0.5, 7, None], [-1.1, 8, None]], True, False),
        ("meta_info/input_token_logprobs", [[None, 0, None], [-0.1, 3, None]], True, True),
    ],
)
def test_each_change_is_found_where_it_matters(path, value, at_ratio_one, at_ratio_four):
    assert found(path, value, keeps_all=True) == at_ratio_one
    assert found(path, value, keeps_all=False) == at_ratio_four


def test_what_was_served_raw_must_be_equal_at_any_ratio():
    assert found("output_ids", [7, 9], keeps_all=False, metasoft_bypass="too_short")
    assert not found("output_ids", [7, 8], keeps_all=False, metasoft_bypass="too_short")


def test_without_raw_twins_less_may_be_cached_and_never_more():
    def differs(tokens: int) -> bool:
        body = copy.deepcopy(ANSWER)
        body["meta_info"]["cached_tokens"] = tokens
        return bool(
            differences(STEP, Outcome(200, ANSWER, SENT), Outcome(200, body, SENT), True, True, has_twins=False)
        )

    assert not differs(0) and differs(201)


@pytest.mark.parametrize(("plain", "ours", "is_wrong"), [(200, 500, True), (400, 200, True), (500, 400, False)])
def test_status(plain, ours, is_wrong):
    assert bool(differences(STEP, Outcome(plain, {}, SENT), Outcome(ours, {}, SENT), True, True)) == is_wrong


def test_two_reasons_to_refuse_a_request_may_be_told_in_either_order():
    step = {"path": "/generate", "body": SENT | {"input_embeds": [[0.1]]}}
    plain, ours = ({"error": {"message": words}} for words in ("input_embeds are off", "n: -1 is not allowed"))
    assert not differences(step, Outcome(400, plain, SENT), Outcome(400, ours, SENT), True, True)
    assert differences(step, Outcome(400, plain, SENT), Outcome(422, ours, SENT), True, True)


def test_how_a_stream_was_cut_does_not_matter():
    def chunks(*texts):
        events = [{"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]} for text in texts]
        return [*events, {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}, "[DONE]"]

    assert merge(chunks("ab", "c")) == merge(chunks("a", "b", "c")) != merge(chunks("a", "b"))
    assert merge(chunks("abc"))["is_done"] and not merge(chunks("abc")[:-1])["is_done"]
