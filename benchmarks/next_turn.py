"""What a context costs a request: its prefill in chunks, and a short next turn over it, plain and compressed.

CPU seconds are the scheduler's own, of whole requests with one output token, medians of the repeats, each over another
text. The next turn appends ``--turn-tokens`` to the prompt before it, whose cache both servers still hold.

    python benchmarks/next_turn.py [--prompt-tokens 6000] [--turn-tokens 40] [--repeats 3] [--output next_turn.json]
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from sglang_metasoft.bench import result_file
from sglang_metasoft.data import DOCUMENT
from sglang_metasoft.demo import model as demo_model
from sglang_metasoft.local_server import Server

METASOFT = ["--enable-metasoft", "--metasoft-path", demo_model.COMPRESSOR]
SYSTEMS = {"plain": [], "metasoft": METASOFT, "during_prefill": [*METASOFT, "--metasoft-during-prefill"]}


def timed(server: Server, prompt: list[int]) -> tuple[float, dict]:
    """CPU seconds of the scheduler for one request of two output tokens, and its ``meta_info``."""
    begin = server.cpu_seconds()
    meta = server.generate(prompt, 2)["meta_info"]
    return server.cpu_seconds() - begin, meta


def measure(server: Server, prompts: list[list[int]], turn: list[int], turns: int) -> dict:
    """Medians over ``prompts`` of the prefill, and over ``turns`` growing turns each of the next turn."""
    server.generate(prompts[0][:600][::-1], 2)
    prefills, next_turns, cached, kv_tokens = [], [], [], []
    for prompt in prompts:
        seconds, meta = timed(server, prompt)
        prefills.append(seconds)
        kv_tokens.append(meta.get("metasoft_kv_tokens", len(prompt)))
        for _ in range(turns):
            prompt = prompt + turn
            seconds, meta = timed(server, prompt)
            next_turns.append(seconds)
            cached.append(meta["cached_tokens"])
    return {
        "prefill_cpu_seconds": round(statistics.median(prefills), 2),
        "next_turn_cpu_seconds": round(statistics.median(next_turns), 3),
        "prefills": [round(value, 2) for value in prefills],
        "next_turns": [round(value, 3) for value in next_turns],
        "cached_tokens": cached,
        "kv_tokens": kv_tokens,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=demo_model.FOLDER, help="where the demo model is kept")
    parser.add_argument("--prompt-tokens", type=int, default=6000)
    parser.add_argument("--turn-tokens", type=int, default=40)
    parser.add_argument("--turns", type=int, default=3, help="next turns over each prompt")
    parser.add_argument("--chunk", type=int, default=1024, help="--chunked-prefill-size of every server")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("flags", nargs="*", help="further flags of every server, after --")
    parser.add_argument("--output", type=Path, help="also write the result as JSON")
    args = parser.parse_args()
    model = demo_model.prepare(args.folder / demo_model.NAME)
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model)(DOCUMENT.read_text())["input_ids"]
    prompts = [(ids[131 * n :] + ids + ids)[: args.prompt_tokens] for n in range(args.repeats)]
    turn = ids[-args.turn_tokens :]
    pool_tokens = 8 * args.prompt_tokens
    common = ["--chunked-prefill-size", str(args.chunk), "--max-total-tokens", str(pool_tokens), "--sleep-on-idle"]
    results = {}
    for name, flags in SYSTEMS.items():
        with (
            tempfile.TemporaryDirectory() as scratch,
            Server(model, [*common, *args.flags, *flags], log=Path(scratch) / "log") as server,
        ):
            results[name] = measure(server, prompts, turn, args.turns)
            print(f"{name}:", json.dumps(results[name]), flush=True)
    if args.output:
        result_file.write(args.output, results)


if __name__ == "__main__":
    main()
