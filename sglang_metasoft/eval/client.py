"""Asks a running server: any OpenAI-compatible one; SGLang through ``/generate`` where log-probabilities are needed.

One server answers all ratios: each request carries its own in ``custom_params``. The prompts of a case share the raw
prefix that the server keeps, so that a second ratio costs little; the uncompressed prompt comes last, because a raw
window in the tree would stop the compression of another. Every case has a tenant key of its own, so that no other case,
mode or earlier run gives it a compressed prefix.
"""

import dataclasses
import time
import uuid
from typing import Any, NamedTuple

import requests

from sglang_metasoft.config import BACKEND_NAME
from sglang_metasoft.eval.case import Case, Rendered, Turn
from sglang_metasoft.eval.fidelity import Reading
from sglang_metasoft.eval.metrics import PERPLEXITY

APIS = ("generate", "completions", "chat")
TIMEOUT_SECONDS = 1800
JOINED_TOKENS = 4
OTHER_TEXT = "##"  # begins no task's question
SCORED_AT_ONCE_TOKENS = 64  # --metasoft-window's default


class Answer(NamedTuple):
    """What a server said to one prompt."""

    text: str
    meta: dict  # the metasoft_ fields and cached_tokens, as far as the server reports them
    logprobs: list[float]
    ids: tuple[int, ...] = ()  # of the answer, from ``/generate`` alone
    choices: tuple[int, ...] = ()  # the likeliest token at each place of ``logprobs``


class Server:
    """A running server.

    Args:
        url: its base, such as ``http://127.0.0.1:30000``.
        api: ``generate`` (SGLang's own: token ids, log-probabilities), ``completions`` (OpenAI's, with token ids) or
            ``chat`` (OpenAI's chat; the server renders the template and continues the answer's prefix). None: generate
            where the server is SGLang, else completions.
        model: the name to ask for; None takes the server's first.

    Raises:
        ValueError: not reachable, or an unknown API.
    """

    def __init__(self, url: str, api: str | None = None, model: str | None = None) -> None:
        self.url = url.rstrip("/")
        info = self._info()
        if api is not None and api not in APIS:
            raise ValueError(f"--api: {api!r} is not allowed; allowed: {', '.join(APIS)}")
        if api == "generate" and not info:
            raise ValueError(f"--api generate: {self.url} is no SGLang server; allowed: completions, chat")
        self.api = api or ("generate" if info else "completions")
        self.has_metasoft = info.get("radix_cache_backend") == BACKEND_NAME
        self.page_size = info.get("page_size") or 1
        self.tokenizer_path = info.get("tokenizer_path") or info.get("model_path")
        self.model = model or self._first_model()

    def _get(self, path: str) -> requests.Response:
        try:
            return requests.get(self.url + path, timeout=60)
        except requests.RequestException as error:
            raise ValueError(f"--url: {self.url} cannot be reached: {error}") from None

    def _info(self) -> dict:
        response = self._get("/server_info")
        return response.json() if response.status_code == 200 else {}

    def _first_model(self) -> str:
        response = self._get("/v1/models")
        if response.status_code != 200:
            raise ValueError(f"--url: {self.url} answers /v1/models with HTTP {response.status_code}")
        return response.json()["data"][0]["id"]

    def _post(self, path: str, body: dict) -> dict:
        try:
            response = requests.post(self.url + path, json=body, timeout=TIMEOUT_SECONDS)
        except requests.RequestException as error:
            raise ValueError(f"--url: {self.url} cannot be reached: {error}") from None
        if response.status_code != 200:
            raise ValueError(f"{self.url}{path} answers HTTP {response.status_code}: {response.text[:300]}")
        return response.json()

    def ask(
        self,
        prompt: Rendered,
        case: Case,
        turn: int,
        *,
        max_new_tokens: int,
        custom_params: dict,
        tenant: str,
        logprobs_from: int | None = None,
    ) -> Answer:
        """One greedy answer.

        Args:
            prompt: the turn's prompt.
            custom_params: the ``metasoft_`` fields; empty for a server without them.
            tenant: prefixes are shared only where this is the same.
            logprobs_from: log-probabilities of the prompt's tokens after this many.

        Raises:
            ValueError: not reachable, or an HTTP error, with what the server said.
        """
        if self.api == "generate":
            return self._generate(prompt, case, max_new_tokens, custom_params, tenant, logprobs_from)
        if logprobs_from is not None:
            raise ValueError(f"task {case.task!r} needs --api generate: others give no log-probabilities of prompts")
        body = {"model": self.model, "max_tokens": max_new_tokens, "temperature": 0, "stop": list(case.stop) or None}
        if self.has_metasoft:
            body |= {"custom_params": custom_params, "extra_key": tenant, "return_meta_info": True}
        if self.api == "completions":
            choice = self._post("/v1/completions", body | {"prompt": prompt.ids})["choices"][0]
            return Answer(choice["text"], choice.get("meta_info") or {}, [])
        body |= {"messages": messages(case, turn), "continue_final_message": True, "add_generation_prompt": False}
        choice = self._post("/v1/chat/completions", body)["choices"][0]
        return Answer(choice["message"]["content"] or "", choice.get("meta_info") or {}, [])

    def _generate(self, prompt, case, max_new_tokens, custom_params, tenant, logprobs_from) -> Answer:
        sampling = {"temperature": 0, "max_new_tokens": max_new_tokens, "stop": list(case.stop)}
        if custom_params:
            sampling["custom_params"] = custom_params
        body = {"input_ids": prompt.ids, "sampling_params": sampling, "extra_key": tenant}
        if logprobs_from is not None:
            body |= {"return_logprob": True, "logprob_start_len": logprobs_from, "top_logprobs_num": 1}
        response = self._post("/generate", body)
        meta = response["meta_info"]
        values = [value for value, *_ in meta.get("input_token_logprobs") or [] if value is not None]
        choices = tuple(best[0][1] for best in meta.get("input_top_logprobs") or [] if best)
        return Answer(response["text"], meta, values, tuple(response["output_ids"]), choices)


def messages(case: Case, turn: int) -> list[dict]:
    """A turn as chat messages; the last is the answer's prefix, to be continued."""
    listed, text = [], case.document
    for earlier in case.turns[:turn]:
        listed.append({"role": "user", "content": text + earlier.question})
        listed.append({"role": "assistant", "content": f"{earlier.answer_prefix} {earlier.answers[0]}"})
        text = ""
    asked = case.turns[turn]
    listed.append({"role": "user", "content": text + asked.question})
    return [*listed, {"role": "assistant", "content": asked.answer_prefix}]


class Measured(NamedTuple):
    """An answer with what has to be known to score it."""

    answer: Answer
    problem: str | None  # why it is not an answer over a compressed prompt
    seconds: float


def measure(
    server: Server,
    case: Case,
    turn: int,
    mode: str,
    ratio: float,
    prompt: Rendered,
    other_ids: list[int],
    run_id: str,
) -> Measured:
    """Ask one turn in one mode at one ratio, and check from the server's report that it was compressed.

    ``repeat`` and ``after`` ask twice: a first request compresses, the second is measured and has to reuse it.

    Args:
        other_ids: of :data:`OTHER_TEXT`, which follows the document in the first request.
        run_id: of this process; keeps runs on one server apart.
    """
    is_full = ratio == 1
    ask, boundary = _prepare(server, case, mode, ratio, prompt, run_id)
    if not is_full and mode != "inside":
        _compress_first(server, case, turn, mode, prompt, other_ids, ask)
    start = time.monotonic()
    if case.metric == PERPLEXITY:
        answer = score_rest(server, prompt, case, turn, ask)
    else:
        answer = server.ask(prompt, case, turn, max_new_tokens=case.max_new_tokens, **ask)
    seconds = time.monotonic() - start
    return Measured(answer, None if is_full else find_problem(answer.meta, mode, boundary, server.page_size), seconds)


def _prepare(
    server: Server, case: Case, mode: str, ratio: float, prompt: Rendered, run_id: str
) -> tuple[dict[str, Any], int | None]:
    """Further arguments of :meth:`Server.ask`, and the boundary to ask for."""
    params: dict = {"metasoft_ratio": ratio} if server.has_metasoft else {}
    if ratio != 1 and not server.has_metasoft:
        raise ValueError(f"ratio {ratio:g}: {server.url} does not compress; allowed: --ratios 1")
    boundary = None
    if mode == "after":
        # A server that renders the template may join the document's last characters with the question's first.
        boundary = prompt.boundary_tokens - (JOINED_TOKENS if server.api == "chat" else 0)
    if boundary and ratio != 1:
        params["metasoft_boundary"] = boundary
    tenant = f"{run_id}/{case.task}/{case.seed}/{case.length_tokens}/{case.index}/{mode}"
    return {"custom_params": params, "tenant": tenant}, boundary


def _compress_first(
    server: Server, case: Case, turn: int, mode: str, prompt: Rendered, other_ids: list[int], ask: dict
) -> Answer:
    """Ask for the first time: the prompt itself or, in mode ``after``, something else about its document."""
    first, first_case = prompt, case
    if mode == "after":
        first = prompt._replace(ids=prompt.ids[: prompt.boundary_tokens] + other_ids)
        first_case = dataclasses.replace(case, turns=(*case.turns[:turn], Turn(OTHER_TEXT, ())))
    return server.ask(first, first_case, turn, max_new_tokens=2, **ask)


class Followed(NamedTuple):
    """How a server's cache reads the full cache's answer."""

    reading: Reading
    own: Answer | None  # what it says itself, where that was asked
    meta: dict
    problem: str | None
    seconds: float


def answer_in_full(server: Server, case: Case, turn: int, prompt: Rendered, run_id: str) -> Answer:
    """The full cache's answer, under a key of its own: its raw prefix must not be in the way of a compression.

    Raises:
        ValueError: the API gives no log-probabilities of prompts, which the reading needs.
    """
    if server.api != "generate":
        raise ValueError(f"task {case.task!r} needs --api generate: others give no log-probabilities of prompts")
    ask, _ = _prepare(server, case, "full", 1, prompt, run_id)
    return server.ask(prompt, case, turn, max_new_tokens=case.max_new_tokens, **ask)


def follow(
    server: Server,
    case: Case,
    turn: int,
    mode: str,
    ratio: float,
    prompt: Rendered,
    answer_ids: list[int],
    other_ids: list[int],
    run_id: str,
) -> Followed:
    """Let a server's cache read an answer: the prompt's log-probabilities of prompt and answer together.

    A first request compresses; prompt and answer then have to find the compressed prefix, which the report tells. In
    modes ``inside`` and ``repeat`` that is the prompt's own, with the first run's window after it; what differs is the
    first token, which in ``inside`` comes from the full prompt and is not counted.

    Args:
        answer_ids: of :func:`answer_in_full`.
        other_ids, run_id: as in :func:`measure`.
    """
    ask, boundary = _prepare(server, case, "full" if ratio == 1 else mode, ratio, prompt, run_id)
    own, problem = None, None
    wants_own = bool(case.turns[turn].answers) and ratio != 1
    counted = len(answer_ids) - (mode == "inside")
    if mode == "after" and not boundary and ratio != 1:
        return Followed(Reading(0, 0, 0.0), None, {}, "boundary", 0.0)
    start = time.monotonic()
    if ratio != 1:
        if mode == "inside" and wants_own:
            own = server.ask(prompt, case, turn, max_new_tokens=case.max_new_tokens, **ask)
        else:
            _compress_first(server, case, turn, mode, prompt, other_ids, ask)
        if wants_own and own is None:
            own = server.ask(prompt, case, turn, max_new_tokens=case.max_new_tokens, **ask)
    both = prompt._replace(ids=prompt.ids + answer_ids)
    found = server.ask(both, case, turn, max_new_tokens=1, logprobs_from=len(both.ids) - counted - 1, **ask)
    if ratio != 1:
        problem = find_problem(found.meta, "repeat" if mode == "inside" else mode, boundary, server.page_size)
    reading = Reading.of(answer_ids[len(answer_ids) - counted :], found.choices, found.logprobs)
    return Followed(reading, own, found.meta, problem, time.monotonic() - start)


def score_rest(server: Server, prompt: Rendered, case: Case, turn: int, ask: dict) -> Answer:
    """Log-probabilities of what follows the document, its first token aside.

    A prompt whose log-probabilities are asked for before its raw window is not compressed, so the rest is scored piece
    by piece, as the end of ever longer prompts.

    Args:
        ask: further arguments of :meth:`Server.ask`.
    """
    values: list[float] = []
    start, answers = prompt.boundary_tokens, []
    while start < len(prompt.ids) - 1:
        end = min(start + SCORED_AT_ONCE_TOKENS, len(prompt.ids))
        piece = prompt._replace(ids=prompt.ids[:end])
        answers.append(server.ask(piece, case, turn, max_new_tokens=1, logprobs_from=start, **ask))
        values += answers[-1].logprobs
        start = end - 1
    # A piece that was not compressed speaks for all.
    meta = next((answer.meta for answer in answers if "metasoft_bypass" in answer.meta), answers[-1].meta)
    return Answer("", meta, values)


def find_problem(meta: dict, mode: str, boundary: int | None, page_size: int) -> str | None:
    """Why an answer is not what its mode means; None if it is.

    Args:
        boundary: where the client asked for one: in mode ``after`` alone.
    """
    if "metasoft_span_tokens" not in meta:
        return "not_reported"
    if "metasoft_bypass" in meta:
        return meta["metasoft_bypass"]
    reused = meta["metasoft_reused_tokens"]
    if mode == "inside":
        return "reused" if reused else None
    expected = meta["metasoft_span_tokens"] if boundary is None else boundary // page_size * page_size
    return None if reused == expected else "not_reused"


def new_run_id() -> str:
    """A key that no other run has."""
    return uuid.uuid4().hex[:12]
