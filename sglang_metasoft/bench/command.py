"""The command line of ``sglang-metasoft bench``."""

import argparse
import json
import sys
from pathlib import Path

from sglang_metasoft.bench import tables
from sglang_metasoft.bench.run import BenchFailed, run_all
from sglang_metasoft.bench.workloads import POOLS, WORKLOADS, Size
from sglang_metasoft.local_server import ServerFailed

# On a CPU a prompt of 32K tokens takes minutes.
GPU_SIZE, CPU_SIZE = Size(32768, 64, 64), Size(2048, 16, 16)


def main(argv: list[str]) -> int:
    """Returns the exit code: 0, or 1 if a server or a workload failed."""
    import torch

    default = GPU_SIZE if torch.cuda.is_available() else CPU_SIZE
    parser = argparse.ArgumentParser(
        prog="sglang-metasoft bench",
        description="Drive plain SGLang and SGLang with --enable-metasoft in turn with SGLang's own benchmark client. "
        "Writes bench.json, bench.md and bench.png.",
        epilog="workloads:\n" + "\n".join(f"  {name:16} {function.__doc__}" for name, function in WORKLOADS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model-path", help="default: the demo model")
    parser.add_argument("--prompt-tokens", type=int, default=default.prompt_tokens)
    parser.add_argument("--output-tokens", type=int, default=default.output_tokens)
    parser.add_argument("--requests", type=int, default=default.requests)
    parser.add_argument("--pool", nargs="+", default=list(POOLS), metavar="POOL", help=f"of {', '.join(POOLS)}")
    parser.add_argument("--workload", nargs="+", default=list(WORKLOADS), metavar="WORKLOAD", help="default: all")
    parser.add_argument(
        "--rounds", type=int, default=1, help="measure all this often; the table has medians (default: 1)"
    )
    parser.add_argument("--output", type=Path, default=Path("bench"), help="folder for the results (default: bench)")
    parser.add_argument(
        "--metasoft", default="--metasoft-during-prefill", help="flags of the compressing server (one string)"
    )
    parser.add_argument("flags", nargs="*", help="flags of both servers, after --")
    args = parser.parse_args(argv)
    size = Size(args.prompt_tokens, args.output_tokens, args.requests)
    args.output.mkdir(parents=True, exist_ok=True)
    if args.model_path is None:
        from sglang_metasoft.demo import model as demo_model

        args.model_path = demo_model.prepare(demo_model.PATH)
    if Path(args.model_path).is_dir():  # the client runs in a folder of its own
        args.model_path = Path(args.model_path).resolve()
    try:
        result = run_all(
            args.model_path, size, args.pool, args.workload, args.metasoft.split(), args.flags, args.rounds,
            say=lambda line: print(line, flush=True),
        )  # fmt: skip
    except (BenchFailed, ServerFailed) as error:
        print(error, file=sys.stderr)
        return 1
    (args.output / "bench.json").write_text(json.dumps(result) + "\n")
    table = tables.table(result)
    (args.output / "bench.md").write_text(table + "\n")
    tables.plot(result, args.output / "bench.png")
    print(f"\n{table}\n\nwritten: {args.output}/bench.json, bench.md, bench.png")
    return 0
