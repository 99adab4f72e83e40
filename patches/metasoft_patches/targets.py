"""The form of a hook table, and the two hooks that every version of SGLang gets.

Each supported version has a table of its own, ``sglang_<version>/targets.py``: every place in that SGLang that MetaSoft
hooks, with path, expected parameters, and who calls it. The tables are plain data, so that the contract test can check
them against SGLang's source without importing it. ``hook`` names a function or method of the version's ``hooks.py``.
"""

from typing import NamedTuple


class Target(NamedTuple):
    """One hook.

    ``stage`` says when it is installed: "flags" and "frontend" when the plugin loads, "scheduler" in a scheduler
    process and only with ``--enable-metasoft``. ``caller`` is a function of SGLang, ``module:qualified.name``, whose
    body must call the target by its name.
    """

    stage: str
    path: str
    kind: str  # before, after, around
    hook: str
    parameters: tuple[str, ...]
    caller: str


# Also hooked in a version that is not supported, so that --enable-metasoft can say so there.
FLAG_TARGETS = (
    Target(
        "flags",
        "sglang.srt.server_args.ServerArgs.add_cli_args",
        "after",
        "add_flags",
        ("parser",),
        "sglang.srt.server_args:prepare_server_args",
    ),
    Target(
        "flags",
        "sglang.srt.server_args.ServerArgs.from_cli_args",
        "around",
        "read_flags",
        ("cls", "args"),
        "sglang.srt.server_args:prepare_server_args",
    ),
)
