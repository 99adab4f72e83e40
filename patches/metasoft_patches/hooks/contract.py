"""Look hooks up in the installed SGLang's source, which is not imported for it."""

import ast
import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from metasoft_patches import compat
from metasoft_patches.hooks.targets import Target

logger = logging.getLogger(__name__)


class ContractError(ValueError):
    """SGLang's source does not have what a hook needs; the message starts with the installed version."""

    def __init__(self, message: str) -> None:
        super().__init__(f"SGLang {version('sglang')}: {message}")


def source_folder() -> Path:
    """SGLang's package folder."""
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        raise ContractError("its source is not to be found")
    return Path(spec.submodule_search_locations[0])


Definition = ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef


def find(module: str, qualified: str) -> Any:
    """The function or class ``qualified`` of a module. Raises ContractError: there is none."""
    path = source_folder().joinpath(*module.split(".")[1:])
    path = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
    if not path.is_file():
        raise ContractError(f"no module {module}")
    node: Any = _parse(path)
    for name in qualified.split("."):
        node = next((child for child in node.body if isinstance(child, Definition) and child.name == name), None)
        if node is None:
            raise ContractError(f"no {module}.{qualified}")
    return node


@functools.cache
def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def split(path: str) -> tuple[str, str]:
    """Module and qualified name: the module is the longest prefix that is a file. Raises ContractError: none is."""
    parts = path.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        if source_folder().joinpath(*parts[1:cut]).with_suffix(".py").is_file():
            return ".".join(parts[:cut]), ".".join(parts[cut:])
    raise ContractError(f"no module for {path}")


def parameters(function: ast.FunctionDef) -> tuple[str, ...]:
    """Names of the parameters in order, with their stars."""
    args = function.args
    names = [arg.arg for arg in args.posonlyargs + args.args]
    if args.vararg:
        names.append("*" + args.vararg.arg)
    names += [arg.arg for arg in args.kwonlyargs]
    if args.kwarg:
        names.append("**" + args.kwarg.arg)
    return tuple(names)


def check_target(target: Target) -> None:
    """Raise ContractError unless the target exists with the parameters that its hook expects."""
    found = parameters(find(*split(target.path)))
    if found != target.parameters:
        raise ContractError(f"{target.path} takes {found}, the hook {target.hook} expects {target.parameters}")


def check_used(path: str, expected: tuple[str, ...]) -> None:
    """Raise ContractError unless the function ``module:name`` takes the expected parameters."""
    found = parameters(find(*path.split(":")))
    if found != expected:
        raise ContractError(f"{path} takes {found}, expected {expected}")


def check_pinned(path: str, fragments: tuple[str, ...]) -> None:
    """Raise ContractError unless the function ``module:name`` has these pieces of code, in this order."""
    source = ast.unparse(find(*path.split(":")))
    for fragment in fragments:
        if fragment not in source:
            raise ContractError(f"{path} no longer has, in this order: {fragments}")
        source = source.split(fragment, 1)[1]


@functools.cache
def check_build() -> None:
    """Compare all that a table knows with the source of a build that is not exactly a tested version, and say so.

    Raises:
        ValueError: something does not fit; all of it is named.
    """
    if compat.is_sglang_tested():
        return
    tested, installed = compat.check_sglang_version(), compat.version("sglang")
    table = importlib.import_module(f"metasoft_patches.sglang_{tested.replace('.', '_')}.targets")
    checks: list[tuple[Callable, tuple]] = [(check_target, (target,)) for target in table.TARGETS]
    checks += [(check_used, used) for used in table.USED]
    checks += [(check_pinned, pinned) for pinned in table.PINNED]
    broken = []
    for check, arguments in checks:
        try:
            check(*arguments)
        except ContractError as error:
            broken.append(str(error))
    if broken:
        raise ValueError(
            f"--enable-metasoft: SGLang {installed} does not fit, though it is a build of {tested}: {'; '.join(broken)}"
        )
    logger.warning(
        "MetaSoft: SGLang %s is a build of %s, which is the tested one; its source fits in all %d places.",
        installed, tested, len(checks),
    )  # fmt: skip


def broken_targets(targets: Iterable[Target]) -> list[str]:
    """For each target that does not fit, one line that says what was found."""
    broken = []
    for target in targets:
        try:
            check_target(target)
        except ContractError as error:
            broken.append(str(error))
    return broken
