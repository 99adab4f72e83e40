"""What would end SGLang's scheduler is refused: on SGLang's own messages, without a server."""

from array import array

import pytest
import sglang.srt.plugins as plugins
from metasoft_patches.http import limits

from sglang_metasoft.request_options import RequestRefused

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
def test_what_the_scheduler_cannot_decode_is_named(monkeypatch, sampling, fields, words):
    monkeypatch.setattr(limits, "IS_PICKLED", False)
    with pytest.raises(RequestRefused, match=words):
        limits.check_message(message(sampling, **fields))


def test_what_is_read_as_it_comes_passes_where_messages_are_pickled(monkeypatch):
    sent = message({"custom_params": {"a": {"b": {}}}}, multi_item_delimiter_indices=1)
    assert limits.IS_PICKLED, "SGLang's default"
    limits.check_message(sent)
    assert sent.sampling_params.custom_params == {"a": {"b": {}}} and sent.multi_item_delimiter_indices == 1
    with pytest.raises(RequestRefused, match="ignore_eos: 'yes' is not allowed"):
        limits.check_message(message({"ignore_eos": "yes"}))
    monkeypatch.setattr(limits, "IS_PICKLED", False)
    with pytest.raises(RequestRefused, match="custom_params|multi_item_delimiter_indices"):
        limits.check_message(sent)


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


def call(**fields):
    """A request for one prompt as SGLang has normalized it."""
    plain = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 0, "sampling_params": {}}
    return io_struct.GenerateReqInput(input_ids=[1], **(plain | fields))


WIDE = list(range(100)) * 100
LOGPROBS = {  # fields, prompt tokens; words if it is refused
    "five of each of 128K tokens": ({"top_logprobs_num": 5}, 131_072, None),
    "the vocabulary, of few": ({"top_logprobs_num": 100, "sampling_params": {"n": 8}}, 4096, None),
    "the vocabulary": ({"top_logprobs_num": 100}, 131_072, "top_logprobs: 100 .* at most 32 .* prompt's 131072 tokens"),
    "for several answers": (
        {"top_logprobs_num": 5, "sampling_params": {"n": 64}}, 131_072,
        "top_logprobs: 5 .* at most 0 .* prompt's 8388608 tokens",
    ),
    "from where it starts": ({"top_logprobs_num": 100, "logprob_start_len": 131_000}, 131_072, None),
    "none of the prompt": ({"top_logprobs_num": 100, "logprob_start_len": -1}, 131_072, None),
    "named ids": ({"token_ids_logprob": WIDE}, 1000, "token_ids_logprob: 'a list of 10000 ids' .* prompt's 1000 token"),
    "named ids, few tokens": ({"token_ids_logprob": WIDE}, 400, None),
    "long answers": (
        {"top_logprobs_num": 100, "sampling_params": {"max_new_tokens": 50_000}, "logprob_start_len": -1}, 10,
        "top_logprobs: 100 .* at most 83 log-probabilities for each of the answer's 50000 tokens",
    ),
    "few of long answers": (
        {"top_logprobs_num": 20, "sampling_params": {"max_new_tokens": 10**6}, "logprob_start_len": -1}, 10, None,
    ),
    "unasked for": ({"return_logprob": False, "token_ids_logprob": WIDE}, 131_072, None),
    "more than there are, unasked for": (
        {"return_logprob": False, "top_logprobs_num": 101}, 10, "top_logprobs: 101 .* at most the vocabulary's 100",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LOGPROBS)
def test_the_log_probabilities_of_a_prompt_and_its_answers_are_bounded(case):
    """Each is two objects in the scheduler and three in the front end: millions of them end both."""
    fields, tokens, words = LOGPROBS[case]
    request, ids = call(**fields), array("q", bytes(8 * tokens))
    if words is None:
        limits.check_prompt(request, ids, VOCABULARY)
    else:
        with pytest.raises(RequestRefused, match=words):
            limits.check_prompt(request, ids, VOCABULARY)


@pytest.mark.parametrize(
    ("prompts", "n", "is_allowed"), [(64, 1024, True), (65, 1024, False), (65_536, 1, True), (40_000, 2, False)]
)
def test_the_answers_to_all_prompts_of_a_call_are_bounded(prompts, n, is_allowed):
    for prompt in ({"text": ["a"] * prompts}, {"input_ids": [[1]] * prompts}):
        call = io_struct.GenerateReqInput(**prompt, sampling_params={"n": n})
        if is_allowed:
            limits.check_call(call)
        else:
            words = f"n: {n} is not allowed; allowed: at most 65536 answers to a call, which has {prompts} prompts"
            with pytest.raises(RequestRefused, match=words):
                limits.check_call(call)
