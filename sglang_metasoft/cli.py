"""The ``sglang-metasoft`` command."""

import argparse
import os
import sys
from pathlib import Path

from sglang_metasoft.train import command as train_command
from sglang_metasoft.version import __version__


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="sglang-metasoft", description="Meta-Soft KV-cache compression for SGLang")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    help_folder = "where the demo model is kept (default: .demo)"
    demo = commands.add_parser("demo", help="two questions about a long document, over a compressed KV cache")
    serve = commands.add_parser("serve-demo", help="leave the demo model's server running")
    fetch = commands.add_parser("demo-model", help="download and convert the demo model only")
    for command in (demo, serve, fetch):
        command.add_argument("--folder", type=Path, default=Path(".demo"), help=help_folder)
    for command in (demo, serve):
        command.add_argument("flags", nargs="*", help="further server arguments, after --")
    train_command.add_arguments(commands.add_parser("train", help="train a compressor for any causal language model"))
    args = parser.parse_args(argv)
    if args.command == "train":
        return train_command.run(args)

    from sglang_metasoft.demo import conversation, model

    if args.command == "demo":
        conversation.run(args.folder, args.flags)
    else:
        folder = model.prepare(args.folder / "SmolLM2-135M-Instruct")
        if args.command == "demo-model":
            print(folder)
        else:
            command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(folder), "--enable-metasoft"]
            os.execv(sys.executable, [*command, "--metasoft-path", model.COMPRESSOR, *args.flags])
    return 0


if __name__ == "__main__":
    sys.exit(main())
