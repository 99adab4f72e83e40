"""What a hit in the cache costs and changes: the same requests to plain SGLang and to one that compresses.

Over natural documents of ten kinds (the development split of ``sglang_metasoft.eval``), each in the ways in which a
prompt comes back: for the first time, again, as a chat's next turn, with another question over the same document
(twice: the first other question still finds the raw document), and after its document was sent ahead with one output
token.
Both servers get the same prompts; a next turn stands on plain SGLang's answer. For each way:

- ``changed``: greedy answers that differ from plain SGLang's, of how many;
- ``kept``: of plain SGLang's answer, read token by token over the cache as it is then, the tokens that are this
  server's first choice too; ``nats``: the rise of its loss by token. Plain SGLang's own ``kept`` is the floor;
- ``computed``: prompt tokens computed, the mean; ``first_token``: seconds until the first token, the median.

    python benchmarks/hit_table.py [--documents 10] [--length 1600] [--ratio 4] [--output hits.json]
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path

import requests

from sglang_metasoft.bench import result_file
from sglang_metasoft.demo import model as demo_model
from sglang_metasoft.eval.case import Turn, answered, make_case, render
from sglang_metasoft.eval.data import Sources
from sglang_metasoft.eval.tasks.natural import DEVELOPMENT, KINDS, TASKS
from sglang_metasoft.local_server import Server

WAYS = ("first", "again", "next turn", "another question", "a third question", "warmed")
SEED = 5


@dataclasses.dataclass
class Asked:
    """One request: what is sent, and what plain SGLang answered."""

    way: str
    case: int
    ids: list[int]
    salt: str
    answer: list[int] = dataclasses.field(default_factory=list)
    plain_loss: float = 0.0


def ask(server: Server, asked: Asked, new_tokens: int) -> tuple[list[int], float, int]:
    """The answer's ids, the seconds to its first token, and the prompt tokens that were computed."""
    payload = {
        "input_ids": asked.ids, "stream": True, "cache_salt": asked.salt,
        "sampling_params": {"temperature": 0, "max_new_tokens": new_tokens},
    }  # fmt: skip
    begin, first, last = time.monotonic(), None, {}
    with requests.post(f"{server.url}/generate", json=payload, stream=True, timeout=600) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if line.startswith(b"data: {"):
                first = first or time.monotonic() - begin
                last = json.loads(line[6:])
    return last["output_ids"], first or 0.0, len(asked.ids) - last["meta_info"]["cached_tokens"]


def read(server: Server, asked: Asked) -> tuple[float, int]:
    """Plain SGLang's answer, read over the cache: mean loss in nats, and how many first choices are the same."""
    response = server.generate(
        asked.ids + asked.answer, 1, cache_salt=asked.salt, return_logprob=True, top_logprobs_num=1,
        logprob_start_len=len(asked.ids) - 1,
    )["meta_info"]  # fmt: skip
    answers = len(asked.answer)
    losses = [-value for value, *_ in response["input_token_logprobs"][-answers:]]
    firsts = [tops[0][1] for tops in response["input_top_logprobs"][-answers:]]
    return sum(losses) / answers, sum(a == b for a, b in zip(firsts, asked.answer, strict=True))


def prepared(tokenizer, documents: int, length: int) -> list:
    """The cases, with the questions of their kinds: two of the first turn, one of the second."""
    tasks = [(kind, task) for kind, task in zip(KINDS, TASKS, strict=True) if kind.split == DEVELOPMENT]
    cases = []
    for number in range(documents):
        kind, task = tasks[number % len(tasks)]
        case = make_case(task, tokenizer, Sources(), length, SEED, number // len(tasks))
        questions = [Turn(f"\n\n{question}", ()) for question in kind.requests[:3]]
        cases.append((case, questions, Turn(kind.further[0], ())))
    return cases


def measure(server: Server, tokenizer, cases: list, known: dict | None, new_tokens: int) -> tuple[dict, dict]:
    """The table of one server, and what was asked; ``known``: what plain SGLang was asked, None: this is that one."""
    rows = {way: {"changed": 0, "kept": 0, "tokens": 0, "rise": 0.0, "computed": [], "first": []} for way in WAYS}
    sent: dict[tuple[int, str], Asked] = {}
    for number, (case, (one, two, three), further) in enumerate(cases):
        chat = dataclasses.replace(case, turns=(one,))
        head = render(chat, 0, tokenizer)
        document = head.ids[: head.boundary_tokens]
        for way in WAYS:
            own = {"another question": two, "a third question": three}.get(way, one)
            ids = render(dataclasses.replace(case, turns=(own,)), 0, tokenizer).ids
            if way == "next turn":
                text = tokenizer.decode(sent[number, "first"].answer, skip_special_tokens=True)
                ids = render(answered(dataclasses.replace(case, turns=(one, further)), 0, text), 1, tokenizer).ids
            salt = f"{number}/{'warmed' if way == 'warmed' else 'own'}"
            asked = Asked(way, number, ids, salt) if known is None else known[number, way]
            if way == "warmed":
                ask(server, Asked("", number, document, salt), 1)
                wait_until_idle(server)
            answer, first, computed = ask(server, asked, new_tokens)
            if known is None:
                asked.answer = answer
            loss, kept = read(server, asked)
            if known is None:
                asked.plain_loss = loss
            sent[number, way] = asked
            row = rows[way]
            row["changed"] += answer != asked.answer
            row["kept"] += kept
            row["tokens"] += len(asked.answer)
            row["rise"] += (loss - asked.plain_loss) * len(asked.answer)
            row["computed"].append(computed)
            row["first"].append(first)
    table = {
        way: {
            "changed": f"{row['changed']} of {len(cases)}",
            "kept": round(row["kept"] / row["tokens"], 3),
            "nats": round(row["rise"] / row["tokens"], 3),
            "computed": round(statistics.mean(row["computed"]), 1),
            "first_token": round(statistics.median(row["first"]), 2),
        }
        for way, row in rows.items()
    }
    return table, sent


def wait_until_idle(server: Server) -> None:
    """A prompt that was warmed is compressed behind its answer."""
    while server.info()["internal_states"][0].get("num_running_reqs", 0):
        time.sleep(0.05)
    time.sleep(0.5)  # no gauge tells that the compression behind the last answer has been committed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=demo_model.FOLDER, help="where the demo model is kept")
    parser.add_argument("--documents", type=int, default=10)
    parser.add_argument("--length", type=int, default=1600, help="tokens of a first prompt and its answer")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--ratio", type=float, default=4)
    parser.add_argument("--output", type=Path, help="also write the result as JSON")
    args = parser.parse_args()
    model = demo_model.prepare(args.folder / demo_model.NAME)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    cases = prepared(tokenizer, args.documents, args.length)
    result, known = {}, None
    metasoft = ["--enable-metasoft", "--metasoft-ratio", f"{args.ratio:g}"]
    for name, flags in (("plain", []), ("metasoft", metasoft)):
        common = ["--max-total-tokens", "65536", "--sleep-on-idle", *flags]
        with tempfile.TemporaryDirectory() as scratch, Server(model, common, log=Path(scratch) / "log") as server:
            server.generate(list(range(100, 700)), 2)
            result[name], sent = measure(server, tokenizer, cases, known, args.new_tokens)
            known = known or sent
        print(f"{name}:", json.dumps(result[name], indent=1), flush=True)
    if args.output:
        result_file.write(args.output, result)


if __name__ == "__main__":
    main()
