"""What the fuzzer draws: programs, JSON all through, so that one that failed can be kept as a file.

A program is a list of rounds; a round is a list of steps, sent at once; a step is one request::

    {"path": "/generate", "body": {...}, "method": "GET",   POST unless given
     "headers": {...},
     "hang_up": 0.3,                                        the client goes away after so many seconds
     "abort": 0.3,                                          ... or asks for its abortion
     "then": "/continue_generation", "after": 0.3,          a second call so much later
     "ours_only": true}                                     would end plain SGLang; ours must refuse it

Placeholders in a body are replaced when it is sent (``programs.resolve``):

    {"ids": [[start, length], ...], "after": step}      token ids of slices of the document, behind an earlier step's
                                                        prompt and answer
    {"text": [[start, length], ...]}                    the same slices as text
    {"messages": [[role, slices], ...], "after": step}  behind an earlier step's messages and answer
    {"response_of": step}                               the id that an earlier answer has
    {"embeds": n}, {"model": true}                      n embeddings; the model's folder
"""

from hypothesis import strategies as st

from tests.differential.endpoints import chat, completion, generate, message, response
from tests.differential.fields import (
    MODEL,
    custom_params,
    mostly,
    yes,
)
from tests.differential.servers import SESSIONS

admin = st.sampled_from([
    {"path": "/flush_cache", "body": {}},
    {"path": "/open_session", "body": {"capacity_of_str_len": 5000, "session_id": SESSIONS[0]}},
    {"path": "/open_session", "body": {"capacity_of_str_len": 5000, "session_id": SESSIONS[1], "streaming": True}},
    {"path": "/close_session", "body": {"session_id": SESSIONS[0]}},
    {"path": "/update_weights_from_disk", "body": {"model_path": {"model": True}}},
    {"path": "/update_weights_from_disk", "body": {"model_path": {"model": True}, "flush_cache": False}},
    {"path": "/update_weights_from_disk", "body": {"model_path": "nowhere"}},
    {"path": "/abort_request", "body": {"abort_all": True}},
    {"path": "/abort_request", "body": {"rid": "r0"}},
    *[{"path": "/pause_generation", "body": {"mode": mode}, "then": "/continue_generation", "after": 0.3}
      for mode in ("retract", "in_place", "abort")],
    *[{"path": path, "method": "GET", "body": {}}
      for path in ("/server_info", "/health", "/health_generate", "/v1/models", "/model_info", "/v1/loads")],
    {"path": "/tokenize", "body": {"model": MODEL, "prompt": "a b"}},
    {"path": "/v1/messages/count_tokens", "body": {"model": MODEL, "messages": [{"role": "user", "content": "a"}]}},
])  # fmt: skip


@st.composite
def ended(draw, requests) -> dict:
    """A request that its client leaves or aborts; it would run for long."""
    step = draw(requests)
    sampling = step["body"].get("sampling_params", step["body"])
    for name in ("max_new_tokens", "max_tokens", "max_completion_tokens", "max_output_tokens"):
        if name in sampling:
            sampling[name] = 50
    step["body"]["rid"] = f"ended-{draw(st.integers(0, 9))}"
    step[draw(st.sampled_from(["hang_up", "abort"]))] = draw(st.sampled_from([0.05, 0.2, 0.6]))
    return step


bombs = st.sampled_from([
    {"path": "/generate", "body": {"text": "", "sampling_params": {"max_new_tokens": 2}}},
    {"path": "/generate", "body": {"text": "a", "return_logprob": True, "top_logprobs_num": 1_000_000}},
    {"path": "/generate", "body": {"text": "a", "sampling_params": {"n": 1_000_000}}},
    {"path": "/v1/completions", "body": {"model": MODEL, "prompt": "", "max_tokens": 2}},
    {"path": "/v1/completions", "body": {"model": MODEL, "prompt": "a", "logprobs": 1_000_000}},
    {"path": "/v1/completions", "body": {"model": MODEL, "prompt": "a", "n": 1_000_000}},
    *[{"path": "/v1/chat/completions", "body": {"model": MODEL, "messages": [{"role": "user", "content": "a"}]} | more}
      for more in ({"logprobs": True, "top_logprobs": 1_000_000}, {"n": 1_000_000})],
]).map(lambda step: step | {"ours_only": True})  # fmt: skip


@st.composite
def with_headers(draw, requests) -> dict:
    """Settings of ours as HTTP headers, now and then."""
    step = draw(requests)
    sampling = step["body"].get("sampling_params", step["body"])
    if "custom_params" not in sampling and draw(mostly(st.just(False), yes, 8)):
        options = draw(custom_params)
        step["headers"] = {f"x-{name.replace('_', '-')}": str(value) for name, value in options.items()}
    return step


requests_ = with_headers(mostly(generate(), st.one_of(completion(), chat(), message(), response()), 2))
others = st.one_of(admin, ended(st.one_of(generate(), completion(), chat())), bombs)
steps = mostly(requests_, others, 6)
rounds = mostly(steps.map(lambda step: [step]), st.lists(steps, min_size=2, max_size=5), 3)
programs = st.lists(rounds, min_size=2, max_size=8).map(lambda all_rounds: {"rounds": all_rounds})
