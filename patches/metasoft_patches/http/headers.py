"""A request's settings and its outcome as HTTP headers: one way for every endpoint, whatever its body may hold.

``HeaderMiddleware`` wraps the HTTP application. It refuses bad headers before the body is read, hands the good ones on
in an ``Exchange``, and holds a response back until the headers that tell the outcome can be put before it.
"""

import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from sglang_metasoft.config import shown
from sglang_metasoft.request_options import RequestOptions, RequestRefused

PREFIX = "x-metasoft-"
SETTINGS = {PREFIX + name: name for name in RequestOptions.FIELDS.values()}
REPORT_FIELDS = ("metasoft_span_tokens", "metasoft_kv_tokens", "metasoft_reused_tokens", "metasoft_bypass")
SCOPE_KEY = "metasoft"
METHODS = ("POST", "PUT")
MAX_HELD = 16  # messages of a response whose outcome does not come

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]


def read_headers(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, Any]:
    """The settings among HTTP headers: setting name to value.

    Raises:
        RequestRefused: an unknown header with our prefix, one given twice, or a value out of range.
    """
    options: dict[str, Any] = {}
    for raw_name, raw_value in headers:
        header = raw_name.decode("latin-1").lower()
        if not header.startswith(PREFIX):
            continue
        if header not in SETTINGS:
            raise RequestRefused(f"unknown header {shown(header)}; allowed: {', '.join(SETTINGS)}")
        name, text = SETTINGS[header], raw_value.decode("latin-1")
        if name in options:
            raise RequestRefused(f"header {header} is given twice; allowed: once")
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = text
        RequestOptions.check(name, value, f"header {header}: {shown(text)}")
        options[name] = value
    if "ratio" in options and "budget" in options:
        raise RequestRefused(f"headers {PREFIX}ratio and {PREFIX}budget are both given; allowed: one of them")
    return options


class Exchange:
    """What one HTTP request asks for in its headers, and what came of it."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.refusal: str | None = None  # why the request was refused after the application had taken it
        self.outcome: dict[str, int | str] | None = None  # header to value; None: not known yet
        self.is_sent = False

    def merge(self, custom_params: dict[str, Any] | None) -> dict[str, Any] | None:
        """``custom_params`` of the body with the headers' settings.

        Raises:
            RequestRefused: the body has another value for one of them.
        """
        if not self.options or not (custom_params is None or isinstance(custom_params, dict)):
            return custom_params  # what is no object is refused by whoever parses it
        merged = dict(custom_params or {})
        for header, name in SETTINGS.items():
            if name in self.options:
                field, value = f"metasoft_{name}", self.options[name]
                if merged.setdefault(field, value) != value:
                    raise RequestRefused(
                        f"header {header}: {value} and custom_params {field}={shown(merged[field])} are both given; "
                        "allowed: one of them, or the same value"
                    )
        return merged

    def report(self, metas: list[dict[str, Any]]) -> None:
        """Note the outcome.

        Args:
            metas: ``meta_info`` of one response for each prompt. Their counts are added, as ``usage`` adds them; none
                says that there is nothing to tell.
        """
        if self.is_sent:
            return
        self.outcome = {}
        for field in REPORT_FIELDS:
            values = [meta[field] for meta in metas if field in meta]
            if values:
                header = field.replace("_", "-")
                is_text = isinstance(values[0], str)
                self.outcome[f"x-{header}"] = ", ".join(sorted(set(values))) if is_text else sum(values)

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """The outcome, as ASGI wants it."""
        return [(name.encode(), str(value).encode("latin-1")) for name, value in (self.outcome or {}).items()]


class HeaderMiddleware:
    """Pure ASGI middleware; see the module."""

    def __init__(self, app: Callable) -> None:
        self.app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Callable, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in METHODS:
            await self.app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        try:
            exchange = Exchange(read_headers(scope["headers"]))
        except RequestRefused as error:
            await send_refusal(path, str(error), send)
            return
        await self.app({**scope, SCOPE_KEY: exchange}, receive, _Held(path, exchange, send))


class _Held:
    """``send`` of one request: keeps the response's first messages until its outcome is known, or it ends."""

    def __init__(self, path: str, exchange: Exchange, send: Send) -> None:
        self.path, self.exchange, self.send = path, exchange, send
        self.messages: list[Message] = []
        self.is_refused = False

    async def __call__(self, message: Message) -> None:
        exchange = self.exchange
        if self.is_refused:
            return
        if exchange.is_sent:
            await self.send(message)
            return
        self.messages.append(message)
        is_open = exchange.outcome is None and exchange.refusal is None
        goes_on = message["type"] == "http.response.start" or message.get("more_body", False)
        if goes_on and is_open and len(self.messages) < MAX_HELD:
            return
        exchange.is_sent = True
        if exchange.refusal is not None:
            self.is_refused = True  # SGLang would tell it as an event of a stream that has begun, or in another shape
            await send_refusal(self.path, exchange.refusal, self.send)
            return
        start = self.messages[0]
        if "headers" in start:
            self.messages[0] = {**start, "headers": [*start["headers"], *exchange.headers]}
        for held in self.messages:
            await self.send(held)
        self.messages = []


async def send_refusal(path: str, message: str, send: Send) -> None:
    """Answer HTTP 400 in the words of the endpoint."""
    body = json.dumps(_error_body(path, message)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def _error_body(path: str, message: str) -> dict[str, Any]:
    """What SGLang 0.5.17 and 0.5.23 answer to a bad request there."""
    if path.startswith("/v1/messages"):
        return {"type": "error", "error": {"type": "invalid_request_error", "message": message}}
    if path.startswith("/v1/responses"):
        return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": 400}}
    if path.startswith("/v1/"):
        return {"object": "error", "message": message, "type": "BadRequest", "param": None, "code": 400}
    return {"error": {"message": message}}
