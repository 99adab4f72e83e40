"""Run one program on all servers at once; what differs from plain SGLang, or is unsound, comes back in words."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from tests.differential import oracle
from tests.differential.servers import Fleet, Outcome, post, send, tracebacks, unsoundness

MOST_AT_ONCE = 8
HIDDEN_SIZE = 576
PLACEHOLDERS = {"ids", "text", "messages", "response_of", "model", "embeds"}


class Run:
    """One program on one fleet.

    Args:
        fleet: the servers.
        tokenizer: the model's.
        document_ids: where prompts are cut from.
    """

    def __init__(self, fleet: Fleet, tokenizer, document_ids: list[int]) -> None:
        self.fleet, self.tokenizer, self.document_ids = fleet, tokenizer, document_ids
        self.sent: list[dict[str, Outcome]] = []  # for each step that has come back: server to outcome
        self.is_timing_free = True  # whether what the trees hold follows from the program alone
        self.problems: list[str] = []
        self.is_unsound = False  # a server died, or its books do not add up
        self.counts: Counter = Counter()  # what was seen, to tell a search that saw something

    def run(self, program: dict) -> list[str]:
        """All rounds, until one is not as it must be."""
        self.fleet.reset()
        known = {name: len(tracebacks(server)) for name, server in self.fleet.servers.items()}
        for steps in program["rounds"]:
            self._round(steps)
            self._check_servers(known)
            if self.problems:
                break
        return self.problems

    def _round(self, steps: list[dict]) -> None:
        alone = len(steps) == 1
        self.is_timing_free &= alone
        history = list(self.sent)

        def work(name: str) -> list[Outcome]:
            with ThreadPoolExecutor(MOST_AT_ONCE) as pool:
                return list(pool.map(lambda step: self._send(name, step, history), steps))

        outcomes = self.fleet.each(work)
        for number in range(len(steps)):
            self.sent.append({name: outcomes[name][number] for name in Fleet.NAMES})
        is_disturbed = any(oracle.disturbs(step) for step in steps)
        self.is_timing_free &= not is_disturbed
        if alone or not is_disturbed:
            for step, result in zip(steps, self.sent[len(history) :], strict=True):
                self._compare(step, result)

    def _send(self, name: str, step: dict, history) -> Outcome:
        if name == "plain" and step.get("ours_only"):
            return Outcome(0, None, {})
        return send(self.fleet.servers[name], step, self.resolve(step["body"], name, history))

    def _compare(self, step: dict, result: dict[str, Outcome]) -> None:
        self.counts[f"{step['path']} {result['plain'].status}"] += 1
        for answer in oracle.answers(result["ratio 4"].body):
            meta = answer["meta_info"]
            self.counts[meta.get("metasoft_bypass", "compressed")] += 1
            self.counts["reused"] += meta.get("metasoft_reused_tokens", 0) > 0
        for name in Fleet.NAMES[1:]:
            found = oracle.differences(
                step, result["plain"], result[name], name == "ratio 1", self.is_timing_free, self.fleet.has_twins
            )
            if found and self._is_confirmed(step, result["plain"], found):
                sent = oracle.shortened(result[name].sent)
                self.problems.append(f"{name}: {step['path']} {sent}\n  " + "\n  ".join(found[:12]))

    def _is_confirmed(self, step: dict, plain: Outcome, found: list[str]) -> bool:
        """Whether plain SGLang, asked alone with an empty and with a warm cache, says again what it said before.

        Where it does not, two tokens are as good as equally likely.
        """
        if not oracle.is_repeatable(step, plain):
            return True
        self.is_timing_free = False
        server = self.fleet.servers["plain"]
        post(server, "/flush_cache", {})
        again = [send(server, step, plain.sent) for _ in range(2)]
        return not any(oracle.differences(step, plain, one, True, False) for one in again)

    def _check_servers(self, known: dict[str, int]) -> None:
        unsound = self.fleet.each(lambda name: unsoundness(self.fleet.servers[name], name != "plain"))
        new = {name: tracebacks(server)[known[name] :] for name, server in self.fleet.servers.items()}
        self.counts["plain SGLang died"] += bool(unsound["plain"])
        for name in Fleet.NAMES[1:]:
            if unsound[name] and not unsound["plain"]:
                self.problems.append(f"{name}: {unsound[name]}")
                self.is_unsound = True
            if new[name] and not new["plain"]:
                self.problems.append(f"{name}: a traceback in the log: {new[name]}")

    # -- placeholders ----------------------------------------------------------------------------------------------

    def resolve(self, value, name: str, history: list[dict[str, Outcome]]):
        """The body as it is sent to one server."""
        if isinstance(value, list):
            return [self.resolve(one, name, history) for one in value]
        if not isinstance(value, dict):
            return value
        if not (len(PLACEHOLDERS & set(value)) == 1 and len(set(value) - {"after"}) == 1):
            return {key: self.resolve(one, name, history) for key, one in value.items()}
        before = history[value["after"]] if value.get("after", len(history)) < len(history) else None
        if "ids" in value:
            return self._earlier_ids(before, name) + self._slices(value["ids"])
        if "text" in value:
            return self.tokenizer.decode(self._slices(value["text"]))
        if "messages" in value:
            own = [
                {"role": role, "content": self.tokenizer.decode(self._slices(parts))}
                for role, parts in value["messages"]
            ]
            return self._earlier_messages(before) + own
        if "embeds" in value:
            return [[0.01] * HIDDEN_SIZE] * value["embeds"]
        if "model" in value:
            return str(self.fleet.model)
        step = value["response_of"]
        body = history[step][name].body if step < len(history) else None
        return body.get("id", "none") if isinstance(body, dict) else "none"

    def _slices(self, parts: list) -> list[int]:
        return [token for start, length in parts for token in self.document_ids[start : start + length]]

    @staticmethod
    def _earlier_ids(before: dict[str, Outcome] | None, name: str) -> list[int]:
        """An earlier prompt and what this server answered, or plain SGLang if that is of another length."""
        found = {}
        for key in ("plain", name) if before else ():
            sent, body = before[key].sent, before[key].body
            if isinstance(sent.get("input_ids"), list) and isinstance(body, dict) and "output_ids" in body:
                found[key] = sent["input_ids"] + body["output_ids"]
        plain, own = found.get("plain", []), found.get(name, [])
        return own if len(own) == len(plain) else plain

    @staticmethod
    def _earlier_messages(before: dict[str, Outcome] | None) -> list[dict]:
        """An earlier conversation and plain SGLang's answer."""
        if not before or not isinstance(messages := before["plain"].sent.get("messages"), list):
            return []
        answer = oracle.answer_text(before["plain"].body)
        return [*messages, {"role": "assistant", "content": answer}] if answer else []
