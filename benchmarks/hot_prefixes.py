"""Do prefixes that are asked again and again survive a stream of prompts that come once? Plain and compressed.

A few documents are asked about in turn, a new short question each time; between two such requests come others over
documents that never come back. The pool holds the hot documents and some of the others, raw. Counted: the share of the
hot documents' tokens that were found in the cache, from the second round on.

    python benchmarks/hot_prefixes.py [--hot 3] [--one-off 3] [--rounds 6] [--tokens 1500] [--output hot.json]
"""

import argparse
import json
import random
import tempfile
from pathlib import Path

from sglang_metasoft.bench import result_file
from sglang_metasoft.data import DOCUMENT
from sglang_metasoft.demo import model as demo_model
from sglang_metasoft.local_server import Server

QUESTION_TOKENS = 24


def measure(server: Server, ids: list[int], args: argparse.Namespace) -> dict:
    """The share of the hot documents that was found, by round, and the prompt tokens computed."""
    rng = random.Random(3)

    def shuffled() -> list[int]:
        return rng.sample(ids, args.tokens)

    hot, found, computed = [shuffled() for _ in range(args.hot)], [], 0
    for _ in range(args.rounds):
        cached = 0
        for document in hot:
            for prompt, is_hot in [(document, True), *((shuffled(), False) for _ in range(args.one_off))]:
                prompt = prompt + rng.sample(ids, QUESTION_TOKENS)
                tokens = server.generate(prompt, 2)["meta_info"]["cached_tokens"]
                computed += len(prompt) - tokens
                cached += tokens if is_hot else 0
        found.append(round(cached / (args.hot * args.tokens), 3))
    later = found[1:]
    return {"found": round(sum(later) / len(later), 3), "by_round": found, "computed_tokens": computed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=demo_model.FOLDER, help="where the demo model is kept")
    parser.add_argument("--hot", type=int, default=3, help="documents that come again")
    parser.add_argument("--one-off", type=int, default=3, help="prompts that come once, after each hot one")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=1500, help="of each document")
    parser.add_argument("--pool", type=int, default=6, help="documents that the pool holds raw")
    parser.add_argument("--output", type=Path, help="also write the result as JSON")
    args = parser.parse_args()
    model = demo_model.prepare(args.folder / demo_model.NAME)
    from transformers import AutoTokenizer

    ids = sorted(set(AutoTokenizer.from_pretrained(model)(DOCUMENT.read_text())["input_ids"]))
    ids *= -(-args.tokens // len(ids))
    pool = str(args.pool * (args.tokens + 2 * QUESTION_TOKENS))
    results = {}
    for name, flags in (("plain", []), ("metasoft", ["--enable-metasoft"])):
        common = ["--max-total-tokens", pool, "--sleep-on-idle", *flags]
        with tempfile.TemporaryDirectory() as scratch, Server(model, common, log=Path(scratch) / "log") as server:
            results[name] = measure(server, ids, args)
            print(f"{name}:", json.dumps(results[name]), flush=True)
    if args.output:
        result_file.write(args.output, results)


if __name__ == "__main__":
    main()
