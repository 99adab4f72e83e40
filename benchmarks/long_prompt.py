"""The prefill of a long prompt: plain, compressed after it, compressed during it (so that attention reads less).

Also served from a pool of a third of the prompt, which only the last can do. Seconds are those of whole requests with
two output tokens, median of the repeats, each with another prompt; CPU seconds are the scheduler's own.

    python benchmarks/long_prompt.py [--prompt-tokens 7680] [--chunk 512] [--repeats 3] [--output long.json]
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import requests

from sglang_metasoft.bench import result_file
from sglang_metasoft.data import DOCUMENT
from sglang_metasoft.demo import model as demo_model
from sglang_metasoft.local_server import Server

SHIPPED = ["--metasoft-path", demo_model.COMPRESSOR, "--metasoft-min-tokens", "128"]
METASOFT = ["--enable-metasoft", *SHIPPED, "--metasoft-ratio", "8"]
VARIANTS = {
    "plain": [],
    "compressed after prefill": METASOFT,
    "compressed during prefill": [*METASOFT, "--metasoft-during-prefill"],
}


def measure(server: Server, prompts: list[list[int]]) -> dict:
    """Seconds of each prompt, or the server's refusal."""
    server.generate(prompts[0][:600], 2)
    seconds, cpu_seconds, kv_tokens = [], [], []
    for prompt in prompts:
        begin, cpu_begin = time.monotonic(), server.cpu_seconds()
        try:
            meta = server.generate(prompt, 2)["meta_info"]
        except requests.HTTPError as error:
            return {"refused": error.response.json()["error"]["message"]}
        seconds.append(round(time.monotonic() - begin, 2))
        cpu_seconds.append(round(server.cpu_seconds() - cpu_begin, 2))
        kv_tokens.append(meta.get("metasoft_kv_tokens", len(prompt)))
    medians = {
        "median_seconds": statistics.median(seconds),
        "median_cpu_seconds": statistics.median(cpu_seconds),
    }
    return medians | {"seconds": seconds, "cpu_seconds": cpu_seconds, "kv_tokens": kv_tokens[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=demo_model.FOLDER, help="where the demo model is kept")
    parser.add_argument("--prompt-tokens", type=int, default=7680)
    parser.add_argument("--chunk", type=int, default=512, help="--chunked-prefill-size of every server")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="also write the result as JSON")
    args = parser.parse_args()
    model = demo_model.prepare(args.folder / demo_model.NAME)
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model)(DOCUMENT.read_text())["input_ids"]
    prompts = [(ids[131 * n :] + ids + ids)[: args.prompt_tokens] for n in range(args.repeats)]
    results = {}
    for pool, pool_tokens in (("ample", 6 * args.prompt_tokens), ("a third", args.prompt_tokens // 3)):
        for name, flags in VARIANTS.items():
            common = ["--chunked-prefill-size", str(args.chunk), "--max-total-tokens", str(pool_tokens)]
            with (
                tempfile.TemporaryDirectory() as scratch,
                Server(model, [*common, *flags], log=Path(scratch) / "log") as server,
            ):
                result = results[f"{pool}, {name}"] = measure(server, prompts)
                print(f"pool {pool} ({pool_tokens} tokens), {name}:", json.dumps(result), flush=True)
    if args.output:
        result_file.write(args.output, results)


if __name__ == "__main__":
    main()
