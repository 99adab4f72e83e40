"""Programs that some tests need: where they lack a test is skipped and says so, but fails in CI."""

import os
import shutil

import pytest

IN_CI = os.environ.get("CI", "").lower() not in ("", "0", "false")


def need(program: str, package: str) -> str:
    """The program's path.

    Args:
        program: looked for on the PATH; METASOFT_<PROGRAM> in the environment comes first.
        package: Debian's, for the message.
    """
    variable = f"METASOFT_{program.upper()}"
    path = os.environ.get(variable) or shutil.which(program)
    if path is None:
        words = f"{program} is not installed: apt-get install {package} (`make tools`), or set {variable}"
        (pytest.fail if IN_CI else pytest.skip)(words)
    return path
