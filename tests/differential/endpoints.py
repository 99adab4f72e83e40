"""A request to each of SGLang's endpoints, as strategies."""

from hypothesis import strategies as st

from tests.differential.fields import (
    CHOICES,
    MODEL,
    NAMED_SCHEMA,
    OPENED,
    ROUTING,
    SAMPLING,
    SHARED_SAMPLING,
    SPAN,
    counted,
    custom_params,
    ids,
    lengths,
    messages,
    models,
    mostly,
    oddly,
    penalty,
    schema,
    some,
    some_ids,
    stops,
    texts,
    yes,
)
from tests.differential.servers import ADAPTER

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
