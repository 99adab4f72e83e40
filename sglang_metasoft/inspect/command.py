"""The subcommand ``inspect``."""

import argparse
import math
import os
import secrets
import sys
from pathlib import Path

from sglang_metasoft.config import AUTO, METHODS, MetaSoftConfig, read_config_json, shown
from sglang_metasoft.demo import model as demo_model

RATIOS = "2,4,8,16"


def main(argv: list[str]) -> int:
    """Compress a prompt at several ratios and write the page; returns the exit code.

    Raises:
        ValueError: an argument, the prompt, the model or the compressor cannot be used; before the long work starts.
    """
    args = _parse(argv)
    ratios = _read_ratios(args.ratios)
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens: {args.max_new_tokens} is not allowed; allowed: an integer >= 1")
    settings = read_config_json(args.metasoft_config) if args.metasoft_config else {}
    for name in ("method", "path"):
        if (value := getattr(args, f"metasoft_{name}")) is not None:
            settings[name] = value
    config = MetaSoftConfig(**settings)
    if args.prompt is not None and not args.prompt.is_file():
        raise ValueError(f"prompt file {shown(str(args.prompt))} is no file; allowed: a text or a chat in JSON")
    draft = _open_draft(args.output)
    try:
        draft.write(_make_page(args, config, ratios))
        draft.close()
        os.replace(draft.name, args.output)
    finally:
        draft.close()
        Path(draft.name).unlink(missing_ok=True)
    print(f"{args.output} ({args.output.stat().st_size / 1e6:.1f} MB): open it in a browser, no network needed")
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="sglang-metasoft inspect",
        description="Show what compression does to a prompt, as one web page: which tokens each layer and head keeps, "
        "where the values of the others flow, and the answers with and without.",
    )
    parser.add_argument(
        "prompt", nargs="?", type=Path, help="text file, or a chat as .json: a list of messages (default: the demo's)"
    )
    parser.add_argument("--question", help="asked after the text, or as a further message of the chat")
    parser.add_argument(
        "--model-path", type=Path, help=f"Hugging Face model folder (default: the demo's, {demo_model.PATH})"
    )
    parser.add_argument("--output", type=Path, default=Path("inspect.html"), help="default: inspect.html")
    parser.add_argument(
        "--ratios", default=RATIOS, help=f"ratios with stored flows and answers, each above 1 (default: {RATIOS})"
    )
    parser.add_argument("--max-new-tokens", type=int, default=64, help="of each answer (default: 64)")
    parser.add_argument("--metasoft-method", help=f"one of: {', '.join((AUTO, *METHODS))}")
    parser.add_argument("--metasoft-path", help="trained compressor: directory or hub id")
    parser.add_argument("--metasoft-config", help="JSON with the server's settings: window, sink, min_tokens, ...")
    return parser.parse_args(argv)


def _read_ratios(text: str) -> list[float]:
    try:
        ratios = sorted({float(part) for part in text.split(",")})
    except ValueError:
        ratios = []
    if not ratios or not all(1 < ratio < math.inf for ratio in ratios):
        raise ValueError(f"--ratios: {shown(text)} is not allowed; allowed: numbers above 1, with commas between")
    return ratios


def _open_draft(output: Path):
    """A file beside ``output``, which takes its place when it is complete."""
    if output.is_dir():
        raise ValueError(f"--output: {shown(str(output))} is a folder; allowed: a file name")
    try:
        # Not of tempfile's, whose mode would not be the one that the umask gives to any other file.
        return output.with_name(f".{output.name}.{secrets.token_hex(4)}").open("xb")
    except OSError as error:
        raise ValueError(f"--output: {shown(str(output))} cannot be written: {error}") from None


def _make_page(args: argparse.Namespace, config: MetaSoftConfig, ratios: list[float]) -> bytes:
    from sglang_metasoft.hf.model import load_tokenizer
    from sglang_metasoft.hf.shape import context_tokens, longest_window, read_config, read_shape
    from sglang_metasoft.inspect.inspected_model import InspectedModel
    from sglang_metasoft.inspect.inspection import check_lengths, inspect
    from sglang_metasoft.inspect.page import render
    from sglang_metasoft.inspect.prompt import read_prompt
    from sglang_metasoft.methods import auto

    folder = args.model_path or demo_model.prepare(demo_model.PATH)
    shape, tokenizer = read_shape(folder), load_tokenizer(folder)
    prompt = read_prompt(args.prompt, args.question, tokenizer)
    limit, window = context_tokens(read_config(folder)), longest_window(read_config(folder))
    check_lengths(prompt, config, ratios, limit and limit - args.max_new_tokens, window)
    auto.check(config, shape, tp_size=1)
    title = args.prompt.name if args.prompt else "State of the Union, 1944"
    facts = {"model": folder.resolve().name}
    model = InspectedModel(folder, tokenizer)
    return render(inspect(title, facts, model, config, prompt, ratios, args.max_new_tokens, _progress))


def _progress(line: str) -> None:
    print(f"inspect: {line}", file=sys.stderr, flush=True)
