"""The ``sglang-metasoft`` command. A subcommand is one line of :data:`COMMANDS`."""

import argparse
import importlib
import sys
from importlib.metadata import entry_points

from sglang_metasoft.version import __version__

PLUGIN_GROUP = "sglang_metasoft.commands"
# Name -> ``module:function``, which takes the arguments after the name and returns the exit code, and one line of help.
# None: the function comes from the entry-point group PLUGIN_GROUP, for commands that need SGLang.
COMMANDS: dict[str, tuple[str | None, str]] = {
    "demo": (
        "sglang_metasoft.demo.commands:demo",
        "ask about a long document, full and compressed KV cache",
    ),
    "serve-demo": ("sglang_metasoft.demo.commands:serve_demo", "leave the demo model's server running"),
    "demo-model": ("sglang_metasoft.demo.commands:demo_model", "download and convert the demo model only"),
    "fit": ("sglang_metasoft.train.fit:main", "make a compressor for a model, in one command"),
    "train": ("sglang_metasoft.train.command:main", "train a compressor for any causal language model"),
    "eval": ("sglang_metasoft.eval.commands:eval_server", "measure the quality of a running server's answers"),
    "eval-hf": ("sglang_metasoft.eval.commands:eval_hf", "the same in process, many methods over one prefill"),
    "eval-report": ("sglang_metasoft.eval.commands:eval_report", "JSON, tables and plots from result files"),
    "eval-data": ("sglang_metasoft.eval.commands:eval_data", "fetch the texts that evaluation tasks are made of"),
    "bench": ("sglang_metasoft.bench.command:main", "plain SGLang against the same server with compression, one run"),
    "inspect": ("sglang_metasoft.inspect.command:main", "show as a web page what compression does to a prompt"),
    "doctor": (None, "say whether this machine can run it, and what to do where it cannot"),
}
EXTRAS = {
    "fit": "train",
    "train": "train",
    "eval": "eval",
    "eval-hf": "eval",
    "eval-report": "eval",
    "demo-model": "demo",
}
USAGE_ERROR = 2


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog="sglang-metasoft",
        description="Meta-Soft KV-cache compression for SGLang",
        epilog="commands:\n" + "\n".join(f"  {name:{width}}  {help}" for name, (_, help) in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="its arguments follow; --help lists them")
    argv = sys.argv[1:] if argv is None else argv
    name = parser.parse_args(argv[:1]).command
    try:
        return load_command(name)(argv[1:])
    except ModuleNotFoundError as error:
        extra = f"pip install 'sglang-metasoft[{EXTRAS[name]}]'" if name in EXTRAS else "install SGLang first"
        why = f"needs the package {_missing(error)}, which is not installed here: {extra}"
        print(f"sglang-metasoft {name}: {why}", file=sys.stderr)
        return USAGE_ERROR
    except ValueError as error:
        print(f"sglang-metasoft {name}: {error}", file=sys.stderr)
        return USAGE_ERROR


def _missing(error: BaseException) -> str | None:
    """The package's name: others' lazy imports raise an error of their own, without it, from the first one."""
    while error.__cause__ is not None:
        error = error.__cause__
    return getattr(error, "name", None)


def load_command(name: str):
    """The function behind a subcommand.

    Raises:
        ValueError: it comes with the installation, which does not have it.
        ModuleNotFoundError: a package that it needs is missing.
    """
    target = COMMANDS[name][0]
    if target is not None:
        module, function = target.split(":")
        return getattr(importlib.import_module(module), function)
    for entry in entry_points(group=PLUGIN_GROUP, name=name):
        return entry.load()
    raise ValueError(f"the installed package has no entry point {PLUGIN_GROUP}:{name}; reinstall sglang-metasoft")


if __name__ == "__main__":
    sys.exit(main())
