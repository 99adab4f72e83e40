"""What would end SGLang's scheduler is refused: on SGLang's own messages, without a server."""

from array import array

import pytest
import sglang.srt.plugins as plugins
from metasoft_patches.http import limits

from sglang_metasoft.config import RequestRefused

plugins.load_plugins()

from sglang.srt.managers import io_struct  # noqa: E402
from sglang.srt.sampling.sampling_params import SamplingParams  # noqa: E402

VOCABULARY = 100


def message(sampling=None, **fields):
    """What goes to the scheduler; without a type check, as SGLang makes it."""
    bulk = dict(input_text="a", input_ids=array("q", [1, 2]), input_embeds=None, mm_inputs=None, token_type_ids=None)
    plain = dict(return_logprob=False, logprob_start_len=-1, top_logprobs_num=0, token_ids_logprob=None, stream=False)
    params = SamplingParams(**(sampling or {}))
    return io_struct.TokenizedGenerateReqInput(**(bulk | plain | {"sampling_params": params, "rid": "x"} | fields))


SOUND = [
    {}, {"top_k": 2**31 - 1}, {"top_k": -1}, {"stop_token_ids": [7, 10**6]}, {"logit_bias": {"5": -1e30}},
    {"stop_token_ids": [99], "min_new_tokens": 3}, {"custom_params": {"metasoft_ratio": 2.5, "a": [1, "b", None]}},
    {"sampling_seed": 2**63 - 1},
]  # fmt: skip


@pytest.mark.parametrize("sampling", SOUND, ids=str)
def test_a_sound_message_passes_and_is_left_alone(sampling):
    sent = message(sampling)
    limits.check_message(sent)
    limits.check_sampling(sent.sampling_params, VOCABULARY)
    assert sent.input_ids == array("q", [1, 2]) and sent.input_text == "a"


@pytest.mark.parametrize(
    ("sampling", "fields", "words"),
    [
        ({"top_k": 1.5}, {}, "top_k: 1.5 is not allowed; allowed: .*`int`"),
        ({"ignore_eos": "yes"}, {}, "ignore_eos: 'yes' is not allowed; allowed: .*`bool`"),
        ({"logit_bias": {"5": None}}, {}, "logit_bias: {'5': None} is not allowed; allowed: .*`float`"),
        ({"custom_params": {"a": {"b": {}}}}, {}, r"custom_params: {'a': {'b': {}}} is not allowed"),
        ({"stop_token_ids": [2**70]}, {}, f"stop_token_ids: .{2**70}. is not allowed"),
        ({"top_k": 2**63}, {}, f"top_k: {2**63} is not allowed; allowed: an integer of 64 bits"),
        ({}, {"priority": 2**64}, f"priority: {2**64} is not allowed"),
        ({}, {"logprob_start_len": 2**63}, f"logprob_start_len: {2**63} is not allowed; allowed: an integer of 64"),
        ({}, {"rid": 5}, "rid: 5 is not allowed; allowed: .*`str"),
    ],
    ids=str,
)
def test_what_the_scheduler_cannot_decode_is_named(sampling, fields, words):
    with pytest.raises(RequestRefused, match=words):
        limits.check_message(message(sampling, **fields))


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        ({"top_k": 2**31}, f"top_k: {2**31} is not allowed; allowed: -1, or an integer from 1 to {2**31 - 1}"),
        ({"logit_bias": {"5": 1e39}}, r"logit_bias of token 5: 1e\+39 is not allowed; allowed: a number from -1e\+30"),
        ({"logit_bias": {"5": float("nan")}}, "logit_bias of token 5: nan is not allowed"),
        ({"stop_token_ids": [100], "min_new_tokens": 1}, "stop_token_ids: 100 is not allowed; allowed: .* 0 to 99"),
        ({"stop_token_ids": [-1], "min_new_tokens": 1}, "stop_token_ids: -1 is not allowed"),
    ],
    ids=str,
)
def test_what_the_samplers_cannot_take_is_named(sampling, words):
    with pytest.raises(RequestRefused, match=words):
        limits.check_sampling(message(sampling).sampling_params, VOCABULARY)


@pytest.mark.parametrize("value", [0, -1, 1025, 10**9, 1.5, True, "2"])
@pytest.mark.parametrize("name", ["n", "beam_width"])
def test_how_many_answers_is_limited(name, value):
    for params in ({name: value}, [{}, {name: value}]):
        with pytest.raises(RequestRefused, match=f"{name}: .* is not allowed; allowed: an integer from 1 to 1024"):
            limits.check_call(io_struct.GenerateReqInput(text="a", sampling_params=params))
    limits.check_call(io_struct.GenerateReqInput(text="a", sampling_params={name: 1024}))
    with pytest.raises(RequestRefused, match="is_normalized: True is not allowed; allowed: nothing"):
        limits.check_call(io_struct.GenerateReqInput(text="a", sampling_params={"is_normalized": True}))
