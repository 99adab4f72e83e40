"""What runners write: one JSON line for each answer, appended as soon as it is there, so that a run can go on."""

import json
import threading
from pathlib import Path

from sglang_metasoft.eval.case import Case
from sglang_metasoft.eval.metrics import FIDELITY, MONOTONE, PERPLEXITY, exact_match, score

KEY = ("task", "seed", "length_tokens", "index", "turn", "mode", "method", "ratio")
FULL = "full"  # the method of an uncompressed prompt


class Store:
    """An append-only JSONL file of answers.

    Args:
        path: created with its folders; answers that it already holds are not asked again. A last line that was cut off
            is dropped.

    Raises:
        ValueError: not writable, or a line that is no answer; the message names the path.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.open("a").close()
            text = self.path.read_text()
        except OSError as error:
            raise ValueError(f"--output: {str(self.path)!r} cannot be written: {error}") from None
        whole, _, rest = text.rpartition("\n")
        if rest:
            self.path.write_text(whole + "\n" if whole else "")
        self.records = read_records(self.path)
        self._by_key = {key_of(record): record for record in self.records}

    def __contains__(self, key: tuple) -> bool:
        return key in self._by_key

    def get(self, key: tuple) -> dict | None:
        """The answer with a key, if it is there."""
        return self._by_key.get(key)

    def add(self, record: dict) -> None:
        """Append a record and flush it."""
        with self._lock:
            with self.path.open("a") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
            self.records.append(record)
            self._by_key[key_of(record)] = record


def key_of(record: dict) -> tuple:
    """What identifies an answer."""
    return tuple(record[name] for name in KEY)


def make_key(case: Case, turn: int, mode: str, method: str, ratio: float) -> tuple:
    """The key that the answer to a case's turn will have."""
    return (case.task, case.seed, case.length_tokens, case.index, turn, mode, method, float(ratio))


def read_records(path: Path) -> list[dict]:
    """The answers in a file.

    Raises:
        ValueError: a line that is no answer, with its number.
    """
    records = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            record = json.loads(line)
            key_of(record)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: line {number} is no evaluation record ({error!r})") from None
        records.append(record)
    return records


def make_record(case: Case, turn: int, mode: str, method: str, ratio: float, **fields) -> dict:
    """The record of an answer.

    Args:
        fields: ``prediction`` (text), ``logprobs`` (of a book's tokens) or what
            :meth:`sglang_metasoft.eval.fidelity.Reading.fields` gives, ``problem`` if the answer must not be scored
            (why it is not of a compressed prompt), and whatever the runner knows besides.
    """
    answers = case.turns[turn].answers
    record = dict(zip(KEY, make_key(case, turn, mode, method, ratio), strict=True))
    record |= {"family": case.family, "metric": case.metric, "answers": list(answers)}
    record |= {name: value for name, value in case.details.items() if name != "classes"}
    if case.metric == PERPLEXITY:
        logprobs = fields.pop("logprobs", None)
        value = sum(logprobs) / len(logprobs) if logprobs else None
        record["scored_tokens"] = len(logprobs) if logprobs else 0
    elif case.metric == FIDELITY:
        value = fields["agreed"] / fields["tokens"] if fields.get("tokens") else None
        if answers and "prediction" in fields:
            fields["exact"] = exact_match(fields["prediction"], answers)
    else:
        value = score(case.metric, cut(fields["prediction"], case.stop), answers, case.details)
    record["score"] = None if fields.get("problem") else value
    return record | fields


def cut(text: str, stop: tuple[str, ...]) -> str:
    """The text before the first stop string."""
    for mark in stop:
        text = text.split(mark, 1)[0]
    return text


def is_settled(case: Case, turn: int, text: str) -> bool:
    """Whether nothing that could follow ``text`` would change the answer's score."""
    if any(mark in text for mark in case.stop):
        return True
    return case.metric in MONOTONE and score(case.metric, text, case.turns[turn].answers, case.details) == 1
