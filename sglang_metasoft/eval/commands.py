"""The command lines of ``sglang-metasoft eval``, ``eval-hf``, ``eval-report`` and ``eval-data``."""

import argparse
from pathlib import Path
from typing import NamedTuple

from sglang_metasoft.eval.case import MODES, Case, Task, make_case
from sglang_metasoft.eval.data import FOLDER, Sources, fetch_all
from sglang_metasoft.eval.own import SUFFIX, OwnPrompt, own_cases, read_own
from sglang_metasoft.eval.tasks import GROUPS, find_tasks


def eval_server(argv: list[str]) -> int:
    """``sglang-metasoft eval``; returns the exit code."""
    parser = _parser("eval", "Measure the quality of a running server's answers.")
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="base URL of the server")
    parser.add_argument("--api", help="generate, completions or chat; default: generate if the server is SGLang")
    parser.add_argument("--model", help="name to ask for; default: the server's first")
    parser.add_argument("--tokenizer", help="folder or hub id; default: what the server names")
    parser.add_argument("--label", default="metasoft", help="name of the server's method in the results")
    parser.add_argument("--concurrency", type=int, default=1, help="cases asked at the same time")
    add_case_arguments(parser)
    _eval(parser.parse_args(argv))
    return 0


def eval_hf(argv: list[str]) -> int:
    """``sglang-metasoft eval-hf``; returns the exit code."""
    parser = _parser("eval-hf", "The same in process, many methods over one prefill.")
    parser.add_argument("--model", required=True, help="folder or hub id of a Hugging Face causal LM")
    parser.add_argument(
        "--methods", nargs="*", default=[], metavar="NAME[+CONSOLIDATION][:SETTING=VALUE,...][@PATH]",
        help="methods of --metasoft-method; oracle: entries ranked by the true answer's attention; for ablations "
        "metasoft_max and metasoft_pooled: the largest attention of the soft tokens, or of an entry's neighbourhood",
    )  # fmt: skip
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu")
    add_case_arguments(parser)
    _eval_hf(parser.parse_args(argv))
    return 0


def eval_report(argv: list[str]) -> int:
    """``sglang-metasoft eval-report``; returns the exit code."""
    parser = _parser("eval-report", "JSON, tables and plots from result files.")
    parser.add_argument("results", nargs="+", type=Path, help="result files, one for each server or runner")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--reference", help="a method that all others are compared with, case by case")
    _report(parser.parse_args(argv))
    return 0


def eval_data(argv: list[str]) -> int:
    """``sglang-metasoft eval-data``; returns the exit code."""
    parser = _parser("eval-data", "Fetch the texts that tasks are made of.")
    parser.add_argument("--data", type=Path, default=FOLDER, help="folder of the texts")
    fetch_all(parser.parse_args(argv).data)
    return 0


def _parser(name: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"sglang-metasoft {name}", description=description)


def add_case_arguments(command: argparse.ArgumentParser) -> None:
    """Which cases, in which modes and at which ratios, and where the answers go."""
    command.add_argument(
        "--tasks", nargs="+", default=["ruler"], metavar="TASK", help=f"tasks, groups ({', '.join(GROUPS)}), or your "
        'own prompts: FILE.jsonl with lines {"messages": [...]} or {"prompt": "..."}, with or without an "answer"',
    )  # fmt: skip
    command.add_argument("--lengths", nargs="+", type=int, default=[2048], help="tokens of prompt and answer together")
    command.add_argument("--ratios", nargs="+", type=float, default=[1, 4, 8, 16], help="1 is the full cache")
    command.add_argument("--modes", nargs="+", default=["inside"], help=f"of {', '.join(MODES)}")
    command.add_argument("--cases", type=int, default=20, help="cases of each task and length")
    command.add_argument("--first", type=int, default=0, help="index of the first case")
    command.add_argument("--seed", type=int, default=1)
    command.add_argument("--data", type=Path, default=FOLDER, help="folder of the texts")
    command.add_argument(
        "--output", type=Path, required=True, help="result file (JSONL); what it holds is not repeated"
    )


class Chosen(NamedTuple):
    """What ``--tasks`` names."""

    tasks: list[Task]
    own: list[tuple[Path, list[OwnPrompt]]]


def choose_tasks(names: list[str]) -> Chosen:
    """Tasks, and the prompts of files.

    Raises:
        ValueError: an unknown task, or a file with a line that is no prompt.
    """
    files = [Path(name) for name in dict.fromkeys(names) if name.endswith(SUFFIX)]
    return Chosen(find_tasks([name for name in names if not name.endswith(SUFFIX)]), [(f, read_own(f)) for f in files])


def make_cases(args: argparse.Namespace, tokenizer) -> list[Case]:
    """The cases that the arguments ask for; all tasks of an index before the next, so that a stopped run is balanced.

    Raises:
        ValueError: an unknown task or mode, a file with a line that is no prompt, a length too short for a task, or a
            number out of range.
    """
    tasks, own = choose_tasks(args.tasks)
    for mode in args.modes:
        if mode not in MODES:
            raise ValueError(f"--modes: {mode!r} is unknown; allowed: {', '.join(MODES)}")
    for name, values, low in (("ratios", args.ratios, 1), ("lengths", args.lengths, 1), ("cases", [args.cases], 1)):
        if any(value < low for value in values):
            raise ValueError(f"--{name}: {min(values):g} is not allowed; allowed: {low} or more")
    sources = Sources(args.data)
    indices = range(args.first, args.first + args.cases)
    owned = [case for path, prompts in own for case in own_cases(path, prompts, tokenizer)]
    return owned + [
        make_case(task, tokenizer, sources, length, args.seed, index)
        for index in indices
        for length in args.lengths
        for task in tasks
    ]


def _eval(args: argparse.Namespace) -> None:
    from sglang_metasoft.eval.client import Server
    from sglang_metasoft.eval.records import Store
    from sglang_metasoft.eval.server_run import Run

    if args.concurrency < 1:
        raise ValueError(f"--concurrency: {args.concurrency} is not allowed; allowed: 1 or more")
    choose_tasks(args.tasks)
    server = Server(args.url, args.api, args.model)
    tokenizer = load_tokenizer(args.tokenizer or server.tokenizer_path)
    store = Store(args.output)
    cases = make_cases(args, tokenizer)
    Run(server, tokenizer, store, label=args.label, ratios=args.ratios, modes=args.modes).run(cases, args.concurrency)
    _print_problems(store)


def _eval_hf(args: argparse.Namespace) -> None:
    import torch

    from sglang_metasoft.eval.hf import HFRunner, MethodSpec
    from sglang_metasoft.eval.records import Store
    from sglang_metasoft.hf.model import HFModel

    choose_tasks(args.tasks)
    specs = [MethodSpec.parse(text) for text in args.methods]
    store = Store(args.output)
    model = HFModel(args.model, torch.device(args.device), getattr(torch, args.dtype))
    ratios = [ratio for ratio in args.ratios if ratio != 1]
    runner = HFRunner(model, specs, ratios, args.modes, store)
    runner.run(make_cases(args, model.tokenizer))
    _print_problems(store)


def _report(args: argparse.Namespace) -> None:
    from sglang_metasoft.eval import report

    for path in report.write(report.load(args.results), args.output, args.reference):
        print(path)


def load_tokenizer(path: str | None):
    """The tokenizer that prompts are made with.

    Raises:
        ValueError: none is named, or it cannot be loaded.
    """
    if path is None:
        raise ValueError("the server names no tokenizer; give --tokenizer, a folder or hub id")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"--tokenizer: {path!r} cannot be loaded: {error}") from None


def _print_problems(store) -> None:
    bad = [record for record in store.records if record.get("problem")]
    print(f"{len(store.records)} answers in {store.path}, {len(bad)} of them not scored")
    for reason in sorted({record["problem"] for record in bad}):
        print(f"  {reason}: {sum(record['problem'] == reason for record in bad)}")
