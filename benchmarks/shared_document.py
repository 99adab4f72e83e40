"""One long document, many questions, a pool too small for the raw document twice: what is computed, what is answered.

The document is real text with one made-up fact for each question. Every question comes as a prompt of its own (document
and question), in three ways: sharing (one after the other, nothing named), not sharing (a ``cache_salt`` for each), and
plain SGLang. Counted are the prompt tokens computed after the first question, against the tokens that come after the
document. The answers of all three are scored by what plain SGLang, with every entry kept, thinks of them: their mean
log-probability per token.

    python benchmarks/shared_document.py [--method snapkv --path ''] [--ratio 4] [--output shared.json]
"""

import argparse
import json
import tempfile
from pathlib import Path

from sglang_metasoft.bench.document_questions import POOL_TOKENS, ask_all, make_prompts
from sglang_metasoft.demo import model as demo_model
from sglang_metasoft.local_server import Server


def score(plain: Server, prompts: list[list[int]], outputs: list[list[int]], known: dict[tuple, list[float]]) -> float:
    """Mean log-probability per token that plain SGLang gives to answers, those ``known`` not asked again."""
    total = []
    for prompt, output in zip(prompts, outputs, strict=True):
        asked = (*prompt, *output)
        if asked not in known:
            response = plain.generate(list(asked), 1, return_logprob=True, logprob_start_len=len(prompt))
            values = [value for value, *_ in response["meta_info"]["input_token_logprobs"]]
            known[asked] = [value for value in values if value is not None]
        total += known[asked]
    return round(sum(total) / len(total), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=demo_model.FOLDER, help="where the demo model is kept")
    parser.add_argument("--method", default="metasoft", help="--metasoft-method of the server")
    parser.add_argument("--path", default=demo_model.COMPRESSOR, help="--metasoft-path; empty for methods without one")
    parser.add_argument("--ratio", type=float, default=4, help="--metasoft-ratio of the server")
    parser.add_argument("--output", type=Path, help="also write the result as JSON")
    args = parser.parse_args()
    model = demo_model.prepare(args.folder / demo_model.NAME)
    from transformers import AutoTokenizer

    prompts, answers, shared = make_prompts(AutoTokenizer.from_pretrained(model))
    common = ["--max-total-tokens", str(POOL_TOKENS)]
    metasoft = ["--enable-metasoft", "--metasoft-method", args.method, "--metasoft-ratio", str(args.ratio)]
    metasoft += ["--metasoft-path", args.path] if args.path else []
    results = {}
    for name, flags in (("metasoft", [*common, *metasoft]), ("plain", common)):
        with tempfile.TemporaryDirectory() as scratch, Server(model, flags, log=Path(scratch) / "log") as server:
            ways = {"sharing": False, "not sharing": True} if name == "metasoft" else {"sharing": False}
            for way, salted in ways.items():
                result = results[f"{name}, {way}"] = ask_all(server, prompts, answers, shared, salted)
                print(f"{name}, {way}:", json.dumps(result), flush=True)
            if name == "plain":
                known: dict[tuple, list[float]] = {}
                for way, result in results.items():
                    result["score"] = score(server, prompts, result["output_ids"], known)
                    print(f"score of {way}: {result['score']}", flush=True)
    if args.output:
        args.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
