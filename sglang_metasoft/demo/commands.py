"""The subcommands ``demo``, ``serve-demo`` and ``demo-model``."""

import argparse
import os
import sys
from pathlib import Path

from sglang_metasoft.demo import conversation, model

MODEL_NAME = "SmolLM2-135M-Instruct"


def demo(argv: list[str]) -> int:
    """Two questions about a long document."""
    args = _parse("demo", argv, takes_flags=True)
    conversation.run(args.folder, args.flags)
    return 0


def serve_demo(argv: list[str]) -> int:
    """Become the demo model's server."""
    args = _parse("serve-demo", argv, takes_flags=True)
    folder = model.prepare(args.folder / MODEL_NAME)
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(folder), "--enable-metasoft"]
    os.execv(sys.executable, [*command, "--metasoft-path", model.COMPRESSOR, *args.flags])


def demo_model(argv: list[str]) -> int:
    """Fetch the model and print its folder."""
    print(model.prepare(_parse("demo-model", argv).folder / MODEL_NAME))
    return 0


def _parse(name: str, argv: list[str], takes_flags: bool = False) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"sglang-metasoft {name}")
    parser.add_argument(
        "--folder", type=Path, default=Path(".demo"), help="where the demo model is kept (default: .demo)"
    )
    if takes_flags:
        parser.add_argument("flags", nargs="*", help="further server arguments, after --")
    return parser.parse_args(argv)
