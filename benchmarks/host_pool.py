"""How many chats a host pool (HiCache) of the same bytes holds, plain and compressed, and what a hit there moves.

Chats of one long prompt each are sent, more than the host pool holds; the device pool holds three of them raw. Then
their next turns are asked, the last chat first, until one is not found any more. Chats that were found are counted; and
from the server's own counters the bytes that were loaded from the host for each chat that was found there.

    python benchmarks/host_pool.py [--tokens 2048] [--raw-chats 8] [--output host_pool.json]
"""

import argparse
import json
import tempfile
from pathlib import Path

from sglang_metasoft.bench import result_file
from sglang_metasoft.data import DOCUMENT
from sglang_metasoft.demo import model as demo_model
from sglang_metasoft.local_server import Server

NEW_TOKENS, QUESTION_TOKENS, DEVICE_CHATS = 8, 16, 3
METASOFT = ("--enable-metasoft", "--metasoft-path", demo_model.COMPRESSOR)


def measure(server: Server, prompts: list[list[int]], question: list[int]) -> dict:
    """Send the prompts, then their next turns, the last one first, until one finds less than half of what was sent."""
    for ids in prompts:
        ids += server.generate(ids, NEW_TOKENS, sampling_params={"ignore_eos": True})["output_ids"]
    first_turns = server.metrics(priority="")
    found = found_on_host = 0
    for ids in reversed(prompts):
        meta = server.generate(ids + question, NEW_TOKENS)["meta_info"]
        if meta["cached_tokens"] < len(ids) // 2:
            break
        found += 1
        found_on_host += meta["cached_tokens_details"]["host"] > len(ids) // 2
    metrics = server.metrics(priority="")
    return {
        "host_pool_tokens": int(metrics["sglang:hicache_host_total_tokens"]),
        "chats_found": found,
        "found_on_host": found_on_host,
        "loaded_bytes_per_hit": round(metrics["sglang:load_back_bytes_total"] / max(found_on_host, 1)),
        "copied_bytes_per_chat": round(first_turns["sglang:hicache_backup_bytes_total"] / len(prompts)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=demo_model.FOLDER, help="where the demo model is kept")
    parser.add_argument("--tokens", type=int, default=2048, help="of each chat's first prompt")
    parser.add_argument("--raw-chats", type=int, default=8, help="chats that the host pool holds raw")
    parser.add_argument("--output", type=Path, help="also write the result as JSON")
    args = parser.parse_args()
    model = demo_model.prepare(args.folder / demo_model.NAME)
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model)(DOCUMENT.read_text())["input_ids"]
    chat_tokens = args.tokens + 2 * NEW_TOKENS + QUESTION_TOKENS
    common = [
        "--enable-hierarchical-cache", "--hicache-ratio", str(args.raw_chats / DEVICE_CHATS), "--enable-metrics",
        "--max-total-tokens", str(DEVICE_CHATS * chat_tokens), "--enable-cache-report", "--decode-log-interval", "1",
        "--sleep-on-idle",
    ]  # fmt: skip
    results = {}
    for name, flags, chats in (("plain", (), args.raw_chats + 2), ("metasoft", METASOFT, 4 * args.raw_chats + 2)):
        # Each starts elsewhere in the document, so none shares a prefix with another.
        prompts = [(ids[97 * n :] + ids)[: args.tokens] for n in range(chats)]
        with (
            tempfile.TemporaryDirectory() as scratch,
            Server(model, [*common, *flags], log=Path(scratch) / "log") as server,
        ):
            results[name] = measure(server, prompts, ids[:QUESTION_TOKENS])
            print(f"{name}:", json.dumps(results[name]), flush=True)
    plain, ours = results["plain"], results["metasoft"]
    print(f"chats held: {ours['chats_found'] / plain['chats_found']:.2f}x")
    print(f"bytes loaded for a hit: {ours['loaded_bytes_per_hit'] / plain['loaded_bytes_per_hit']:.2f}x")
    if args.output:
        result_file.write(args.output, results)


if __name__ == "__main__":
    main()
