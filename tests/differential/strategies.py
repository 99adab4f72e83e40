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

from tests.differential.servers import ADAPTER, MIN_TOKENS, SESSIONS, WINDOW

yes = st.just(True)
PAGE, CHUNK, VOCABULARY, DOCUMENT_TOKENS = 16, 256, 49152, 4900
SPAN = MIN_TOKENS + WINDOW
EDGES = sorted(
    edge + by
    for edge in (2, WINDOW, MIN_TOKENS, SPAN, SPAN + PAGE, CHUNK, CHUNK + WINDOW, CHUNK + SPAN, 2 * CHUNK)
    for by in (-1, 0, 1)
)
MODEL = "m"
models = st.sampled_from([MODEL] * 7 + [f"{MODEL}:{ADAPTER}"])


@st.composite
def some(draw, options: dict, most: int = 3) -> dict:
    """A few of the fields."""
    names = draw(st.lists(st.sampled_from(list(options)), max_size=most, unique=True))
    return {name: draw(options[name]) for name in names}


def mostly(good, rare, one_in: int = 16):
    """The second strategy now and then."""
    return st.integers(0, one_in - 1).flatmap(lambda n: rare if n == one_in - 1 else good)


# -- prompts -------------------------------------------------------------------------------------------------------

long_lengths = mostly(st.sampled_from(EDGES) | st.integers(MIN_TOKENS, 400), st.integers(400, 2500), 12)
documents = st.tuples(st.sampled_from([0, 800]), st.sampled_from([200, 130, 300, 96, 520])).map(list)
questions = st.tuples(st.integers(0, 9).map(lambda n: 3000 + 100 * n), st.integers(1, 100)).map(list)
lone = st.tuples(st.sampled_from([0, 800, 1601, 2000]), mostly(long_lengths, st.integers(1, 40), 4)).map(list)
slices = mostly(
    st.lists(questions, min_size=1, max_size=2).flatmap(lambda asked: documents.map(lambda part: [part, *asked])),
    lone.map(lambda part: [part]),
    3,
)
earlier = st.none() | st.integers(0, 5)


def with_earlier(kind: str, parts) -> st.SearchStrategy:
    return st.tuples(parts, earlier).map(
        lambda pair: {kind: pair[0]} if pair[1] is None else {kind: pair[0], "after": pair[1]}
    )


ids = mostly(with_earlier("ids", slices), st.sampled_from([[5], [1, 2], [VOCABULARY - 1, 7]]), 20)
texts = slices.map(lambda parts: {"text": parts})
turns = st.tuples(st.sampled_from(["user", "system", "assistant"]), slices).map(list)
messages = with_earlier(
    "messages",
    st.one_of(slices.map(lambda parts: [["user", parts]]), st.lists(turns, min_size=1, max_size=3)),
)

# -- fields --------------------------------------------------------------------------------------------------------

schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
NAMED_SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
CHOICES = ["none", "auto", "required"]
SCHEMA_TEXT = '{"type":"object","properties":{"a":{"type":"integer"}},"required":["a"]}'
lengths = mostly(st.integers(1, 8), st.sampled_from([0, 1, 30]), 6)
counted = mostly(st.integers(1, 8), st.sampled_from([1, 30]), 6)  # to a chat, 0 means no limit
stops = st.sampled_from([" the", [" a", " of"], ",", "\n", ["zzz"]])
penalty = st.sampled_from([0.5, -0.5, 2.0, 0.0])
some_ids = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=3)
GRAMMARS = {
    "json_schema": st.just(SCHEMA_TEXT),
    "regex": st.sampled_from(["[a-c]{2,4}", "(yes|no)", "\\d+"]),
    "ebnf": st.just('root ::= "yes" | "no" [a-z]*'),
}
SHARED_SAMPLING = {  # under one name in all of SGLang's own endpoints
    "stop": stops, "stop_token_ids": st.lists(st.integers(0, 400), max_size=4), "ignore_eos": yes,
    "stop_regex": st.sampled_from(["a.", "[,.]"]), "no_stop_trim": st.booleans(), "skip_special_tokens": st.booleans(),
    "frequency_penalty": penalty, "presence_penalty": penalty, "repetition_penalty": st.sampled_from([1.2, 0.8]),
    "logit_bias": st.sampled_from([{"28": -5.0}, {"28": 3, "260": -1}]), "top_k": st.sampled_from([1, 5, -1]),
    "top_p": st.sampled_from([0.5, 1.0]), "min_p": st.sampled_from([0.0, 0.2]), "n": st.integers(1, 3), **GRAMMARS,
}  # fmt: skip
SAMPLING = SHARED_SAMPLING | {
    "temperature": st.sampled_from([0, 0.7, 1.5]), "min_new_tokens": st.integers(0, 4), "beam_width": st.integers(1, 3),
    "spaces_between_special_tokens": st.booleans(), "sampling_seed": st.integers(0, 9),
    "stream_interval": st.integers(1, 4),
}  # fmt: skip
ROUTING = {  # what says whose request it is; none of it changes an answer
    "cache_salt": st.sampled_from(["a", "b"]), "extra_key": st.sampled_from(["a", "b"]),
    "priority": st.sampled_from([0, 1, -1, 100]), "session_id": st.sampled_from(["agent-1", "agent-2"]),
    "rid": st.sampled_from(["r0", "r1"]), "bootstrap_host": st.just("2.2.2.2"), "routed_dp_rank": st.just(0),
}  # fmt: skip
OPENED = {"session_params": st.sampled_from(SESSIONS).map(lambda name: {"id": name})}
custom_params = st.one_of(
    st.fixed_dictionaries({"metasoft_boundary": st.sampled_from([96, 130, 200, 300, 64, 1])}),
    st.fixed_dictionaries({"metasoft_ratio": st.sampled_from([1, 2, 8, 1000])}),
    st.fixed_dictionaries({"metasoft_budget": st.sampled_from([1, 50, 100, 4000])}),
    st.fixed_dictionaries({"metasoft_budget": st.just(60), "metasoft_boundary": st.just(200)}),
    st.just({"mine": 1}),
)
ODD = st.sampled_from([None, -1, 0, 2**31, 1.5, "x", [], {}, True])  # where a number or an object is expected


def oddly(fields: dict, names: list[str]) -> dict:
    """Let some fields, by name, now and then have a value of another kind."""
    return fields | {name: mostly(fields[name], ODD, 8) for name in names if name in fields}


# -- requests ------------------------------------------------------------------------------------------------------

GENERATE = ROUTING | OPENED | {
    "return_text_in_logprobs": st.booleans(), "return_hidden_states": st.sampled_from([False, True, "last"]),
    "return_flat_raw_top_logprobs": yes, "log_metrics": st.booleans(), "no_logs": yes,
    "return_prompt_token_ids": yes, "return_entropy": yes, "return_routed_experts": yes,
    "conversation_id": st.just("c"), "routing_key": st.just("k"), "custom_labels": st.just({"a": "b"}),
    "lora_path": st.sampled_from([ADAPTER, "none"]), "return_sampling_mask": yes, "require_reasoning": yes,
    "multi_item_delimiter_indices": st.just([1]), "background": yes, "max_thinking_tokens": st.just(4),
    "kv_hints": st.just({}), "watermark": st.just({"enabled": False}), "return_indexer_topk": yes,
}  # fmt: skip


@st.composite
def generate(draw) -> dict:
    """``POST /generate``."""
    sampling = {"temperature": 0, "max_new_tokens": draw(lengths)}
    if draw(st.booleans()):
        sampling["ignore_eos"] = True
    sampling |= draw(mostly(st.just({}), some(oddly(SAMPLING, ["stop", "n", "top_k", "min_new_tokens"])), 2))
    if draw(mostly(st.just(False), yes, 12)):
        sampling |= {"beam_width": draw(st.integers(2, 3)), "max_new_tokens": draw(st.integers(2, 12))}
    if draw(mostly(st.just(False), yes, 5)):
        sampling["custom_params"] = draw(custom_params)
    kind = draw(mostly(st.just("ids"), st.sampled_from(["text", "batch", "text batch", "embeds"]), 4))
    body: dict = {"sampling_params": sampling}
    if kind == "ids":
        body["input_ids"] = draw(ids)
    elif kind == "text":
        body["text"] = draw(texts)
    elif kind == "embeds":
        body["input_embeds"] = {"embeds": draw(st.sampled_from([1, 5, SPAN + 10]))}
    else:
        many = draw(st.lists(ids if kind == "batch" else texts, min_size=1, max_size=3))
        body["input_ids" if kind == "batch" else "text"] = many
    body["return_logprob"] = True
    if draw(mostly(st.just(False), yes, 4)):
        body |= draw(
            some({
                "logprob_start_len": st.sampled_from([0, -1, 1, 50, 96, 100, 168, 199, 200, 201, 299, 400]),
                "top_logprobs_num": st.integers(0, 5), "token_ids_logprob": some_ids,
            })
        )  # fmt: skip
    body |= draw(mostly(st.just({}), some(GENERATE, 2), 3))
    if draw(mostly(st.just(False), yes, 4)):
        body["stream"] = True
    return {"path": "/generate", "body": body}


@st.composite
def completion(draw) -> dict:
    """``POST /v1/completions``."""
    body = {"model": draw(models), "temperature": 0, "max_tokens": draw(lengths)}
    body["prompt"] = draw(
        st.one_of(ids, texts, st.lists(ids, min_size=1, max_size=2), st.lists(texts, min_size=1, max_size=2))
    )
    fields = SHARED_SAMPLING | ROUTING | OPENED | {
        "echo": yes, "logprobs": st.integers(0, 3), "best_of": st.integers(1, 2), "suffix": st.just("."),
        "seed": st.integers(0, 3), "min_tokens": st.integers(0, 3), "return_token_ids": yes, "user": st.just("u"),
        "return_cached_tokens_details": yes, "return_hidden_states": yes,
        "lora_path": st.sampled_from([ADAPTER, "none"]), "custom_params": custom_params,
        "response_format": st.just(NAMED_SCHEMA),
    }  # fmt: skip
    body |= draw(some(oddly(fields, ["stop", "n", "logprobs", "custom_params"]), 4))
    return {"path": "/v1/completions", "body": body | draw(streams())}


tool = {
    "name": "look", "description": "Look it up.",
    "parameters": {"type": "object", "properties": {"what": {"type": "string"}}, "required": ["what"]},
}  # fmt: skip


def streams():
    """Fields of a streamed OpenAI request, mostly none."""
    usage = st.sampled_from([{}, {"stream_options": {"include_usage": True}},
                             {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}])  # fmt: skip
    return mostly(st.just({}), usage.map(lambda more: {"stream": True} | more), 3)


@st.composite
def chat(draw) -> dict:
    """``POST /v1/chat/completions``."""
    body = {"model": draw(models), "temperature": 0, "messages": draw(messages)}
    body[draw(st.sampled_from(["max_tokens", "max_completion_tokens"]))] = draw(counted)
    fields = SHARED_SAMPLING | ROUTING | OPENED | {
        "logprobs": yes, "top_logprobs": st.integers(0, 4), "seed": st.integers(0, 3), "user": st.just("u"),
        "min_tokens": st.integers(0, 3), "custom_params": custom_params,
        "tools": st.just([{"type": "function", "function": tool}]),
        "tool_choice": st.sampled_from([*CHOICES, {"type": "function", "function": {"name": "look"}}]),
        "parallel_tool_calls": st.booleans(), "continue_final_message": yes, "return_meta_info": yes,
        "return_prompt_token_ids": yes, "return_cached_tokens_details": yes,
        "response_format": st.sampled_from([{"type": "json_object"}, NAMED_SCHEMA]),
        "reasoning_effort": st.sampled_from(["low", "none"]), "separate_reasoning": st.booleans(),
        "chat_template_kwargs": st.just({"enable_thinking": False}), "return_token_ids": yes,
        "return_input_ids_in_sglext": yes, "return_output_ids_in_sglext": yes,
    }  # fmt: skip
    body |= draw(some(oddly(fields, ["stop", "n", "top_logprobs", "tools"]), 4))
    return {"path": "/v1/chat/completions", "body": body | draw(streams())}


@st.composite
def message(draw) -> dict:
    """``POST /v1/messages``."""
    body = {"model": MODEL, "temperature": 0, "max_tokens": draw(counted), "messages": draw(messages)}
    fields = {
        "system": texts, "stop_sequences": st.just([" the"]), "top_k": st.integers(1, 5), "top_p": st.just(0.5),
        "metadata": st.just({"user_id": "u"}), "stream": yes,
        "tools": st.just([{"name": tool["name"], "input_schema": tool["parameters"]}]),
        "tool_choice": st.sampled_from(
            [*({"type": kind} for kind in ("auto", "any", "none")), {"type": "tool", "name": "look"}]
        ),
        "thinking": st.sampled_from([{"type": "disabled"}, {"type": "enabled", "budget_tokens": 1024}]),
        "cache_control": st.just({"type": "ephemeral"}),
    }  # fmt: skip
    body |= draw(some(oddly(fields, ["top_k", "stop_sequences"])))
    return {"path": "/v1/messages", "body": body}


@st.composite
def response(draw) -> dict:
    """``POST /v1/responses``."""
    body = {
        "model": MODEL,
        "temperature": 0,
        "max_output_tokens": draw(counted),
        "input": draw(st.one_of(texts, messages)),
    }
    fields = {
        "instructions": texts, "previous_response_id": st.integers(0, 4).map(lambda step: {"response_of": step}),
        "stream": yes, "top_logprobs": st.integers(0, 3), "store": st.booleans(), "user": st.just("u"),
        "stop": stops, "frequency_penalty": penalty, "presence_penalty": penalty, "metadata": st.just({"a": "b"}),
        "text": st.just({"format": {"type": "json_schema", "name": "a", "schema": schema}}),
        "truncation": st.just("auto"),
        "tools": st.just([{"type": "function", **tool}]), "tool_choice": st.sampled_from(CHOICES),
        "include": st.just(["message.output_text.logprobs"]), "background": yes,
        **{name: ROUTING[name] for name in ("cache_salt", "extra_key", "priority", "session_id")},
    }  # fmt: skip
    body |= draw(some(oddly(fields, ["stop", "top_logprobs"])))
    return {"path": "/v1/responses", "body": body}


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
