"""A seeded random workload against a real server, checked from inside and outside whenever the server idles.

    python tests/soak.py --seconds 600 --seed 1 [--faults] [--flags="--page-size 16"]

Prints a summary and exits non-zero if anything was not as it must be. The requests follow from the seed; how they
overlap in time does not.
"""

import argparse
import dataclasses
import itertools
import json
import random
import re
import shlex
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import requests

sys.path.insert(0, str(Path(__file__).parents[1]))  # when run as a script

from sglang_metasoft.data import DOCUMENT  # noqa: E402
from sglang_metasoft.local_server import Server  # noqa: E402
from sglang_metasoft.types import Bypass  # noqa: E402
from tests.server.checks import (
    SALT,
    SOFT_TOKENS,
    aborting,
    assert_pool_is_whole,
    assert_sound_inside,
    inside_env,
    inside_lines,
)  # noqa: E402

POOL_TOKENS = 4096
MAX_PROMPT = 1500
THREADS = 10
ROUND_TASKS = 50
ROUNDS_PER_POOL_CHECK = 15
FLAGS = "--page-size 16 --chunked-prefill-size 512 --enable-mixed-chunk"
RETRACTION = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "10"}
HOST_POOL = "--enable-hierarchical-cache --hicache-ratio 2"
# "decline": a load from the host pool, where there is one.
FAULTS = dict(probe=0.05, reserve=0.05, job=0.05, nan=0.05, layer=0.05, write=0.05, decline=0.2)
OPTIONS = [
    *[{}] * 5, {"metasoft_ratio": 1}, {"metasoft_ratio": 2}, {"metasoft_ratio": 8}, {"metasoft_budget": 1},
    {"metasoft_budget": 100}, {"metasoft_budget": 300},
]  # fmt: skip
BAD_OPTIONS = [
    {"metasoft_ratio": 0.5}, {"metasoft_ratio": "x"}, {"metasoft_budget": 0}, {"metasoft_budget": 1.5},
    {"metasoft_colour": 1}, {"metasoft_ratio": 2, "metasoft_budget": 100},
]  # fmt: skip
KINDS = dict(
    chat=16, document=18, repeat=12, short=48, stream=8, tenant=8, abort=8, hang_up=4, invalid=4, logprobs=4,
    parallel=3, batch=3, sampled=3, too_long=1,
)  # fmt: skip


@dataclasses.dataclass
class Summary:
    """What happened; ``failures`` is empty if all is well."""

    requests: int = 0
    rounds: int = 0
    checks: int = 0
    compressed: int = 0
    reused: int = 0
    retractions: int = 0
    aborted: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    kinds: Counter = dataclasses.field(default_factory=Counter)
    bypasses: Counter = dataclasses.field(default_factory=Counter)
    faults: Counter = dataclasses.field(default_factory=Counter)
    failures: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        lines = [f"{name}: {dict(value) if isinstance(value, Counter) else value}" for name, value in values.items()]
        return "\n".join(lines[:-1] + [f"failures: {len(self.failures)}", *self.failures[:20]])


class Refused(Exception):
    """The server says that a prompt could neither be compressed nor stay raw."""


REFUSAL = "could not be compressed"


class Soak:
    """Runs rounds of tasks; all randomness of a task comes from the seed and the task's number."""

    def __init__(self, server: Server, document_ids: list[int], seed: int, expects_faults: bool = False) -> None:
        self.server, self.ids, self.seed, self.expects_faults = server, document_ids, seed, expects_faults
        self.summary = Summary()
        self.lock = threading.Lock()
        self.numbers = itertools.count()
        self.chats: list[list[int]] = []
        self.past: list[tuple[list[int], dict]] = []

    def run(self, seconds: float) -> Summary:
        """Rounds until the time is over, each followed by the checks of an idle server."""
        end = time.monotonic() + seconds
        with ThreadPoolExecutor(THREADS) as pool:
            while time.monotonic() < end and not self.summary.failures:
                tasks = [random.Random(f"{self.seed}-{next(self.numbers)}") for _ in range(ROUND_TASKS)]
                list(pool.map(self.task, tasks))
                self.check_idle()
        self.check_log()
        return self.summary

    # -- one task --------------------------------------------------------------------------------------------------

    def task(self, source: random.Random) -> None:
        (kind,) = source.choices(list(KINDS), list(KINDS.values()))
        try:
            getattr(self, f"do_{kind}")(source)
        except Refused:
            with self.lock:
                self.summary.refused += 1
        except Exception as error:
            self.fail(f"{kind}: {type(error).__name__}: {error}")
        with self.lock:
            self.summary.kinds[kind] += 1

    def fail(self, words: str) -> None:
        with self.lock:
            self.summary.failures.append(words[:2000])

    def text(self, source: random.Random, low: int, high: int) -> list[int]:
        """Tokens of the document from anywhere."""
        length = source.randint(low, high)
        start = source.randrange(len(self.ids) - length)
        return self.ids[start : start + length]

    def document_prompt(self, source: random.Random) -> list[int]:
        """One of a few documents and a question about it."""
        number = source.randrange(5)
        document = self.ids[number * 700 : number * 700 + (200, 520, 600, 750, 1200)[number]]
        return document + self.text(source, 10, 150)

    def post(self, body: dict, **kwargs) -> requests.Response:
        with self.lock:
            self.summary.requests += 1
        response = requests.post(f"{self.server.url}/generate", json=body, timeout=kwargs.pop("timeout", 180), **kwargs)
        if response.status_code == 503 and REFUSAL in response.text:
            raise Refused
        return response

    def body(self, ids, new_tokens: int, options: dict | None = None, **fields) -> dict:
        sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
        if options:
            sampling["custom_params"] = options
        return {"input_ids": ids, "sampling_params": sampling | fields.pop("sampling", {})} | fields

    def ask(self, ids: list[int], new_tokens: int, options: dict | None = None, **fields) -> dict:
        response = self.post(self.body(ids, new_tokens, options, **fields))
        assert response.status_code == 200, f"HTTP {response.status_code}: {response.text}"
        self.check_response(response.json(), ids, new_tokens, options)
        return response.json()

    def check_response(self, response: dict, ids: list[int], new_tokens: int, options: dict | None = None) -> None:
        """Answered whole, counted in logical tokens, and either compressed or with a reason why not."""
        meta = response["meta_info"]
        if REFUSAL in meta["finish_reason"].get("message", ""):
            raise Refused
        assert meta["finish_reason"]["type"] == "length", meta
        assert (meta["prompt_tokens"], meta["completion_tokens"]) == (len(ids), new_tokens), meta
        assert 0 <= meta["cached_tokens"] < len(ids), meta
        span, kept, reused = (meta[f"metasoft_{name}_tokens"] for name in ("span", "kv", "reused"))
        bypass = meta.get("metasoft_bypass")
        assert (span == 0) == (bypass is not None) and 0 <= span < len(ids) and kept <= len(ids), meta
        if bypass is not None:
            assert bypass in set(Bypass) and kept == len(ids), meta
        if bypass == Bypass.FAULT:
            assert self.expects_faults, meta
        if options and 1 in options.values():
            assert bypass == Bypass.OPTED_OUT, meta
        with self.lock:
            self.summary.retractions += meta["num_retractions"]
            self.summary.compressed += span > 0
            self.summary.reused += reused > 0
            self.summary.prompt_tokens += len(ids)
            if bypass is not None:
                self.summary.bypasses[bypass] += 1

    # -- kinds of tasks --------------------------------------------------------------------------------------------

    def do_chat(self, source) -> None:
        with self.lock:
            ids = self.chats.pop(source.randrange(len(self.chats))) if len(self.chats) > 3 else []
        ids = ids or self.text(source, 200, 900)
        for _ in range(source.randint(1, 2)):
            new_tokens = source.randint(2, 12)
            ids = ids + self.ask(ids, new_tokens)["output_ids"] + self.text(source, 10, 120)
        if len(ids) < MAX_PROMPT:
            with self.lock:
                self.chats.append(ids)

    def do_document(self, source) -> None:
        ids, options = self.document_prompt(source), source.choice(OPTIONS)
        self.ask(ids, source.randint(1, 10), options)
        with self.lock:
            self.past.append((ids, options))

    def do_repeat(self, source) -> None:
        with self.lock:
            ids, options = source.choice(self.past[-30:]) if self.past else (self.text(source, 50, 700), {})
        self.ask(ids, source.randint(1, 10), options)

    def do_short(self, source) -> None:
        self.ask(self.text(source, 1, 80), source.randint(1, 16))

    def do_tenant(self, source) -> None:
        """Named tenants share with themselves; a new one shares with nobody."""
        ids = self.document_prompt(source)
        if source.random() < 0.3:
            meta = self.ask(ids, 4, **{SALT: f"new-{source.random()}"})["meta_info"]
            assert meta["num_retractions"] > 0 or meta["cached_tokens"] == meta["metasoft_reused_tokens"] == 0, meta
        else:
            fields = source.choice([{SALT: "a"}, {"extra_key": "a"}, {SALT: "a", "extra_key": "b"}])
            self.ask(ids, 4, source.choice(OPTIONS), **fields)

    def do_stream(self, source) -> None:
        ids, new_tokens = self.document_prompt(source), source.randint(2, 12)
        with self.post(self.body(ids, new_tokens) | {"stream": True}, stream=True) as response:
            events = [line[6:] for line in response.iter_lines() if line.startswith(b"data: ")]
        assert events[-1] == b"[DONE]", events[-1]
        self.check_response(json.loads(events[-2]), ids, new_tokens)

    def do_logprobs(self, source) -> None:
        ids = self.document_prompt(source)
        start = source.choice([-1, 0, len(ids) - 20, len(ids) - 1])
        meta = self.ask(ids, 4, return_logprob=True, logprob_start_len=start)["meta_info"]
        assert len(meta["output_token_logprobs"]) == 4, meta
        if start >= 0:
            assert [token for _, token, _ in meta["input_token_logprobs"]] == ids[start:], "prompt log-probabilities"

    def do_parallel(self, source) -> None:
        ids = self.document_prompt(source)
        response = self.post(self.body(ids, 4, sampling={"n": 2}))
        assert response.status_code == 200 and len(response.json()) == 2, response.text
        for one in response.json():
            self.check_response(one, ids, 4)

    def do_batch(self, source) -> None:
        prompts = [self.document_prompt(source) for _ in range(3)]
        response = self.post(self.body(prompts, 4))
        assert response.status_code == 200, response.text
        for ids, one in zip(prompts, response.json(), strict=True):
            self.check_response(one, ids, 4)

    def do_sampled(self, source) -> None:
        sampling = {"temperature": 1.0, "top_p": 0.9, "frequency_penalty": 0.5}
        self.ask(self.document_prompt(source), 8, sampling=sampling)

    def do_invalid(self, source) -> None:
        response = self.post(self.body(self.text(source, 5, 600), 4, source.choice(BAD_OPTIONS)))
        assert response.status_code == 400 and "metasoft" in response.text, f"{response.status_code} {response.text}"

    def do_too_long(self, source) -> None:
        ids = self.ids[: POOL_TOKENS + source.randint(1, 500)]
        response = self.post(self.body(ids, 4, {"metasoft_ratio": 1}))
        assert response.status_code == 400, f"{response.status_code} {response.text}"

    def do_abort(self, source) -> None:
        """Aborted while waiting, prefilling, compressing or decoding; the answer says so, if it came to that."""
        rid = f"abort-{source.random()}"
        with aborting(self.server, rid, source.random() * 2):
            response = self.post(self.body(self.document_prompt(source), 300, rid=rid))
        assert response.json()["meta_info"]["finish_reason"]["type"] == "abort", response.text
        with self.lock:
            self.summary.aborted += 1

    def do_hang_up(self, source) -> None:
        """The client goes away."""
        try:
            self.post(self.body(self.document_prompt(source), 300), timeout=0.05 + source.random() * 2)
        except requests.Timeout:
            with self.lock:
                self.summary.aborted += 1

    # -- between rounds --------------------------------------------------------------------------------------------

    def check_idle(self) -> None:
        """The server answers, idles, and finds nothing wrong inside."""
        before = len(inside_lines(self.server, "ok"))
        try:
            self.ask(self.ids[:20], 2)
            assert_sound_inside(self.server, before)
        except Exception as error:
            self.fail(f"between rounds: {type(error).__name__}: {error}")
        self.summary.checks = len(inside_lines(self.server, "ok"))
        self.summary.rounds += 1
        if self.summary.rounds % ROUNDS_PER_POOL_CHECK == 0:
            self.check_pool()

    def check_pool(self) -> None:
        try:
            assert_pool_is_whole(self.server, POOL_TOKENS, self.expects_faults)
        except AssertionError as error:
            self.fail(f"the pool: {error}")

    def check_log(self) -> None:
        """At the end: the pool once more, and each traceback in the log is an injected fault's."""
        if self.server.process.poll() is None:
            self.check_pool()
        else:
            self.summary.failures.insert(0, f"the server died:\n{self.server.log_tail(80)}")
        text = self.server.log.read_text(errors="replace")
        self.summary.faults = Counter(re.findall(r"metasoft inside: fault (\w+)", text))
        tracebacks, injected = text.count("Traceback (most"), text.count("InjectedFault: ")
        if tracebacks != injected:
            self.fail(f"{tracebacks} tracebacks, {injected} injected faults")


def soak(model: Path, document_ids, log: Path, seconds: float, seed: int, faults: bool, flags: str = FLAGS) -> Summary:
    """Start a server, soak it, stop it."""
    command = [
        *SOFT_TOKENS, "--enable-metrics", "--max-total-tokens", str(POOL_TOKENS), *shlex.split(flags)
    ]  # fmt: skip
    env = inside_env(seed=seed, **(FAULTS if faults else {})) | RETRACTION
    with Server(model, command, log=log, env=env | {"SGLANG_CHECK_KV_PAGE_INVARIANTS": "1"}) as server:
        return Soak(server, document_ids, seed, expects_faults=faults).run(seconds)


def main() -> int:
    from transformers import AutoTokenizer

    from sglang_metasoft.demo import model as demo_model
    from tests.conftest import DEMO_FOLDER

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--faults", action="store_true", help="let every stage of the compression fail now and then")
    parser.add_argument("--flags", default=FLAGS, help=f"further flags of the server; default: {FLAGS}")
    parser.add_argument("--model", type=Path, help="default: the demo model")
    parser.add_argument("--log", type=Path, default=None, help="file for the server's output")
    args = parser.parse_args()
    model = args.model or demo_model.prepare(DEMO_FOLDER / demo_model.NAME)
    document = DOCUMENT.read_text()
    document_ids = AutoTokenizer.from_pretrained(model)(document)["input_ids"]
    log = args.log or Path(tempfile.mkdtemp()) / "server.log"
    print(f"server log: {log}", flush=True)
    summary = soak(model, document_ids, log, args.seconds, args.seed, args.faults, args.flags)
    print(summary)
    return 1 if summary.failures else 0


if __name__ == "__main__":
    sys.exit(main())
