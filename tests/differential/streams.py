"""One answer out of the events of a stream: how the pieces were cut depends on timing, what they add up to does not."""

import json

import requests


def read_stream(response: requests.Response) -> dict:
    """The stream's end state as JSON: ``{"stream": kind, ...}`` with all texts joined, usage and finish reasons."""
    events = []
    for line in response.iter_lines():
        if line.startswith(b"data:"):
            data = line[5:].strip()
            events.append("[DONE]" if data == b"[DONE]" else json.loads(data))
    return merge(events)


def merge(events: list) -> dict:
    """What the events add up to, in the form that :mod:`oracle` compares."""
    merged: dict = {"stream": True, "is_done": bool(events) and events[-1] == "[DONE]"}
    for event in events:
        if event == "[DONE]":
            continue
        if not isinstance(event, dict) or "error" in event:
            merged.setdefault("errors", []).append(event)
        elif "meta_info" in event:  # /generate: each event holds all so far
            merged.setdefault("answers", {})[str(event.get("index", 0))] = event
        elif "choices" in event:
            _add_choices(merged, event)
        elif event.get("type", "").startswith("response."):
            if "response" in event:
                merged["response"] = event["response"]
        else:
            _add_message_event(merged, event)
    return merged


def _add_choices(merged: dict, event: dict) -> None:
    """A chunk of ``/v1/completions`` or ``/v1/chat/completions``."""
    if event.get("usage"):
        merged["usage"] = event["usage"]
    for choice in event["choices"]:
        known = merged.setdefault("choices", {}).setdefault(str(choice["index"]), {"text": ""})
        delta = choice.get("delta") or choice
        known["text"] += delta.get("text") or delta.get("content") or ""
        for call in delta.get("tool_calls") or []:
            calls = known.setdefault("tool_calls", {}).setdefault(str(call.get("index")), "")
            function = call["function"]
            known["tool_calls"][str(call.get("index"))] = calls + (function.get("name") or "") + function["arguments"]
        if choice.get("finish_reason"):
            known["finish_reason"] = choice["finish_reason"]
        for name, values in (choice.get("logprobs") or {}).items():
            known.setdefault("logprobs", {}).setdefault(name, []).extend(values or [])


def _add_message_event(merged: dict, event: dict) -> None:
    """An event of ``/v1/messages``."""
    kind = event.get("type")
    if kind == "message_start":
        merged["message"] = event["message"]
    elif kind == "content_block_delta":
        delta = event["delta"]
        texts = merged.setdefault("texts", {})
        key = str(event["index"])
        texts[key] = texts.get(key, "") + (
            delta.get("text") or delta.get("partial_json") or delta.get("thinking") or ""
        )
    elif kind == "message_delta":
        merged["delta"] = event["delta"]
        merged["usage"] = event.get("usage")
    elif kind not in ("content_block_start", "content_block_stop", "message_stop", "ping"):
        merged.setdefault("other", []).append(event)
