"""How the demo's questions were chosen: each candidate with both caches and without the document.

Every candidate has one right answer, which the text gives. It counts as right if the answer holds the words beside it,
several of them separated by ``&``, alternatives by ``|``; so a right name in a wrong sentence counts too.

    python benchmarks/demo_questions.py [--url http://localhost:30000] [--output demo_questions.json]
"""

import argparse
import contextlib
import tempfile
from pathlib import Path

from sglang_metasoft.bench import result_file
from sglang_metasoft.data import DOCUMENT
from sglang_metasoft.demo import model as demo_model
from sglang_metasoft.demo.conversation import CACHES, ask
from sglang_metasoft.demo.questions import SHIPPED, Task, check_length, document_message, question_message
from sglang_metasoft.local_server import Server

CANDIDATES = {
    "Where did Mr. Hull go in October?": "moscow",
    "Which two cities did the speaker go to in November?": "cairo&teheran",
    "In one word, what is the one supreme objective for the future?": "security",
    "Who said that we must all hang together?": "franklin",
    "How many airplanes were not made in June and July, 1943?": "thousand",
    "On which date does the stabilization statute expire?": "june 30",
    "Which four democratic nations have experience with national service?": "britain&canada&australia&zealand",
    "How many different soldier voting laws are there?": "forty-eight|48",
    "Complete the sentence: Necessitous men are not": "free",
    "To what were the draft age limits broadened in August, 1918?": "18-45",
    "On the march to which three cities are the Americans?": "rome&berlin&tokyo",
    "How much will the cost of food law cost in appropriations?": "one percent|1%|1 percent",
    "How many measures does the speaker recommend?": "five",
    "What is every family's right?": "decent home",
    "What is the name of the Generalissimo?": "chiang",
    "Which part of our people are on fixed incomes?": "quarter",
    "How many American citizens in the armed forces want to vote?": "ten million",
    "When did Benjamin Franklin say that?": "july 4",
    "To whom is this message addressed?": "congress",
    "Who gave the joint recommendation for the national service law?": "war department&navy&maritime",
    "Freedom from fear is eternally linked with what?": "freedom from want",
    "What are among our deadliest enemies?": "overconfidence&complacency",
    "The war is against what?": "slavery",
    "Which three countries showed that disturbers of the peace need military control?": "germany&italy&japan",
    "When did Germany surrender in the first World War?": "november",
    "How many Americans are there?": "130|one hundred and thirty",
    "Where were the notable victories of last spring?": "stalingrad",
    "Who is the Prime Minister?": "churchill",
    "What kind of peace should all nations join in?": "just and durable",
    "What did the President call for in 1918?": "force to the utmost",
    "What is the name of the Marshal?": "stalin",
    "What will a national service law prevent?": "strikes",
    "What has become accepted as a second Bill of Rights?": "security",
    "Which law would prevent strikes?": "national service",
    "Which city did Mr. Hull go to?": "moscow",
    "In which month did Mr. Hull go to Moscow?": "october",
    "Who went to Moscow in October?": "hull",
    "Who expressed the common sense principle best on July 4, 1776?": "franklin",
    "How many Americans are on the march to Rome, Berlin, and Tokyo?": "130",
    "Which two countries are truly united with Britain and America?": "china&russia",
    "Which Generalissimo is named?": "chiang",
    "Which Marshal is named?": "stalin",
    "In which city do pests swarm through the cocktail bars?": "washington",
    "What should the tax law tax?": "profits",
    "What was broadened in August, 1918?": "draft",
    "When does the statute of October, 1942 expire?": "june 30",
    "Which statute should be reenacted early?": "stabilization",
    "What do all of these rights spell?": "security",
    "What is the right of every family?": "decent home",
    "What is the right of every farmer?": "products|decent living",
    "Which right would the soldiers and sailors be deprived of?": "vote",
    "What did Germany do in November, 1918?": "surrender",
    "What did the signers of the Constitution not intend?": "franchise",
    "Which grave dangers did one of the great American industrialists emphasize?": "rightist",
    "What did the Nation go on in the wild twenties?": "joy ride|roller coaster",
    "Where were the U-boats?": "high seas",
    "In which months of 1943 did war production fall off?": "june&july",
    "What is the most democratic way to wage a war?": "national service",
    "Which nation has an experience with national service like Britain, Canada and New Zealand?": "australia",
    "For whom is the Constitution's franchise, those who are doing what?": "fighting",
    "Hungry people who are out of a job are the stuff of which what is made?": "dictatorship",
    "What does the speaker ask Congress to explore the means for?": "bill of rights",
}


class Running(Server):
    """A server that runs already."""

    def __init__(self, url: str) -> None:
        self.url = url


def is_right(answer: str, words: str) -> bool:
    return all(any(one in answer.lower() for one in alternatives.split("|")) for alternatives in words.split("&"))


def try_all(server: Server, boundary_tokens: int) -> list[dict]:
    """Ask each candidate on its own; prints a line each."""
    head, rows = document_message(DOCUMENT.read_text()), []
    for question, words in CANDIDATES.items():
        answers = {
            cache: ask(server, [head, question_message(question)], cache, boundary_tokens).text for cache in CACHES
        }
        alone = [document_message("(missing)"), question_message(question)]
        answers["no document"] = ask(server, alone, "full", 0).text
        right = {name: is_right(answer, words) for name, answer in answers.items()}
        rows.append({"question": question, "words": words, "answers": answers, "right": right})
        print(
            *("+-"[not ok] for ok in right.values()),
            question,
            "|",
            answers["full"],
            "|",
            answers["compressed"],
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running server, with --enable-metasoft; default: one on the demo model")
    parser.add_argument("--folder", type=Path, default=demo_model.FOLDER, help="where the demo model is kept")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    model = demo_model.prepare(args.folder / demo_model.NAME)
    from transformers import AutoTokenizer

    task = Task("the shipped document", DOCUMENT.read_text(), SHIPPED)
    boundary_tokens = check_length(task, AutoTokenizer.from_pretrained(model), 8192)
    flags = ["--enable-metasoft", "--metasoft-path", demo_model.COMPRESSOR, "--sleep-on-idle"]
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        log = Path(scratch) / "server.log"
        server = Running(args.url) if args.url else stack.enter_context(Server(model, flags, log=log))
        rows = try_all(server, boundary_tokens)
    counts = {name: sum(row["right"][name] for row in rows) for name in (*CACHES, "no document")}
    counts["both caches"] = sum(all(row["right"][cache] for cache in CACHES) for row in rows)
    print(f"{len(rows)} candidates, right:", counts)
    if args.output:
        result_file.write(args.output, {"counts": counts, "rows": rows})


if __name__ == "__main__":
    main()
