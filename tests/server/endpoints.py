"""The five endpoints that generate: what a prompt looks like in each, how each answers, streams and counts."""

import functools
import json
from typing import NamedTuple

import requests


class Answer(NamedTuple):
    """What a client sees."""

    status: int
    headers: dict  # ours, without the prefix
    body: dict  # of an error, or the last that has usage
    prompt_tokens: int | None
    cached_tokens: int | None
    meta: dict | None  # of /generate


@functools.cache
def served_name(url: str) -> str:
    """Which the Responses API insists on."""
    return requests.get(f"{url}/v1/models", timeout=60).json()["data"][0]["id"]


def ask(
    server, path: str, text: str, /, stream: bool, headers: dict | None = None, session=requests, **fields
) -> Answer:
    """One request of few output tokens for a prompt of one user message, or of plain text; None drops a field."""
    chat = {"messages": [{"role": "user", "content": text}], "max_tokens": 3, "model": "default"}
    body = {
        "/generate": {"text": text, "sampling_params": {"max_new_tokens": 3, "temperature": 0}},
        "/v1/completions": {"model": "default", "prompt": text, "max_tokens": 3},
        "/v1/chat/completions": chat,
        "/v1/messages": chat,
        "/v1/responses": {"input": text, "max_output_tokens": 16, "model": served_name(server.url)},
    }[path]
    body = {name: value for name, value in (body | {"stream": stream} | fields).items() if value is not None}
    if stream and path in ("/v1/completions", "/v1/chat/completions"):
        body["stream_options"] = {"include_usage": True}
    response = session.post(server.url + path, json=body, headers=headers, timeout=300)
    return read(response, stream)


def read(response: requests.Response, stream: bool) -> Answer:
    ours = {
        name.lower().removeprefix("x-metasoft-"): value if name.lower().endswith("bypass") else int(value)
        for name, value in response.headers.items()
        if name.lower().startswith("x-metasoft-")
    }
    is_stream = stream and response.headers["content-type"].startswith("text/event-stream")
    events = (
        [response.json()]
        if not is_stream
        else [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    )
    usages = [(event, usage) for event in events if (usage := _usage(event))]
    body, usage = usages[-1] if usages else (events[-1], {})
    prompt = usage.get("prompt_tokens", usage.get("input_tokens"))
    cached = usage.get("cached_tokens", usage.get("cache_read_input_tokens", 0))
    for details in ("prompt_tokens_details", "input_tokens_details"):
        cached = (usage.get(details) or {}).get("cached_tokens", cached)
    if "cache_read_input_tokens" in usage:  # Anthropic's API counts them apart
        prompt += cached
    return Answer(response.status_code, ours, body, prompt, cached, body.get("meta_info"))


def _usage(event: dict) -> dict | None:
    for holder in (event, event.get("response"), event.get("message")):
        found = holder.get("usage") or holder.get("meta_info") if isinstance(holder, dict) else None
        if found and (found.get("prompt_tokens") is not None or found.get("input_tokens") is not None):
            return found
    return None
