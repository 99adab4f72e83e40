"""Keep the raw span of a compressed prompt as first-to-evict nodes, or free it at once? (``--metasoft-keep-raw``)

Two workloads, each in a tight and in an ample pool: several long questions about each of a few documents (a second
question can hit the raw document only), and chats of three turns (a later turn hits the compressed prefix). Counted are
the prompt tokens that had to be computed, and the requests that found no free slots for their compressed entries.

    python benchmarks/retention.py [--output retention.json]
"""

import argparse
import itertools
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sglang_metasoft.bench import result_file
from sglang_metasoft.data import DOCUMENT
from sglang_metasoft.demo import model as demo_model
from sglang_metasoft.local_server import Server

DOCUMENTS, QUESTIONS, CHATS, TURNS = 3, 4, 6, 3
DOCUMENT_TOKENS, CHAT_TOKENS, QUESTION_TOKENS = 1600, 1200, 100
POOLS = {"tight": 6144, "ample": 32768}
CLIENTS = 3


def shared_documents(server: Server, ids: list[int]) -> list[dict]:
    """Round after round, one new question about each document; a question is longer than the raw window."""
    documents = [ids[n * 700 :][:DOCUMENT_TOKENS] for n in range(DOCUMENTS)]
    metas = []
    for number in range(QUESTIONS):
        question = ids[4000 + number * 40 :][:QUESTION_TOKENS]
        with ThreadPoolExecutor(CLIENTS) as pool:
            metas += pool.map(lambda document: server.generate(document + question, 8)["meta_info"], documents)  # noqa: B023
    return metas


def growing_chats(server: Server, ids: list[int]) -> list[dict]:
    """Round after round, one turn of each chat."""
    chats = [ids[n * 450 :][:CHAT_TOKENS] for n in range(CHATS)]
    metas = []
    for number in range(TURNS):
        with ThreadPoolExecutor(CLIENTS) as pool:
            responses = list(pool.map(lambda chat: server.generate(chat, 8), chats))
        metas += [response["meta_info"] for response in responses]
        turn = ids[4200 + 30 * number :][:30]
        chats = [chat + response["output_ids"] + turn for chat, response in zip(chats, responses, strict=True)]
    return metas


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=demo_model.FOLDER, help="where the demo model is kept")
    parser.add_argument("--output", type=Path, help="also write the result as JSON")
    args = parser.parse_args()
    model = demo_model.prepare(args.folder / demo_model.NAME)
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model)(DOCUMENT.read_text())["input_ids"]
    ids = ids + ids[::-1]
    rows = []
    columns = ("pool", "raw span", "workload", "prompt tokens", "computed", "no free slots", "seconds")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for (pool, pool_tokens), keep in itertools.product(POOLS.items(), (True, False)):
        flags = ["--enable-metasoft", "--metasoft-path", demo_model.COMPRESSOR, "--max-total-tokens", str(pool_tokens)]
        flags.append("--metasoft-keep-raw" if keep else "--no-metasoft-keep-raw")
        with tempfile.TemporaryDirectory() as scratch, Server(model, flags, log=Path(scratch) / "log") as server:
            for workload in (shared_documents, growing_chats):
                begin = time.monotonic()
                metas = workload(server, ids)
                row = {
                    "pool": pool,
                    "raw span": "kept" if keep else "freed",
                    "workload": workload.__name__,
                    "prompt tokens": sum(meta["prompt_tokens"] for meta in metas),
                    "computed": sum(meta["prompt_tokens"] - meta["cached_tokens"] for meta in metas),
                    "no free slots": sum(meta.get("metasoft_bypass") == "no_free_slots" for meta in metas),
                    "seconds": round(time.monotonic() - begin, 1),
                }
                rows.append(row)
                print("| " + " | ".join(str(value) for value in row.values()) + " |", flush=True)
    if args.output:
        result_file.write(args.output, rows)


if __name__ == "__main__":
    main()
