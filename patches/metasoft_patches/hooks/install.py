"""Put hooks into SGLang, and make sure that they run: SGLang logs a hook that fails, and drops one that comes late."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pkgutil import resolve_name
from types import FunctionType, MethodType
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookSource, HookType

from metasoft_patches.hooks.targets import Target

SOURCE = HookSource(plugin_name="metasoft", dist_name="sglang-metasoft")

# What was last registered for each path.
_hooks: dict[str, Callable] = {}


def register_hooks(targets: Iterable[Target], *owners: Any) -> None:
    """Register hooks; each is the attribute ``target.hook`` of the first of the owners that has it.

    A path that another plugin has hooked already is closed to SGLang's registry: there ours goes on top at once. A hook
    that runs already is left as it is.
    """
    for target in targets:
        owner = next((owner for owner in owners if hasattr(owner, target.hook)), owners[-1])
        hook, kind = getattr(owner, target.hook), HookType(target.kind)
        if _hooks.get(target.path) == hook and _runs(target.path):
            continue
        HookRegistry.register(target.path, hook, kind, source=SOURCE)
        _hooks[target.path] = hook
        if target.path in HookRegistry._patched:
            HookRegistry._apply_target(target.path, [(kind, hook, SOURCE)])


def verify_hooks(targets: Iterable[Target]) -> None:
    """Refuse to go on unless every hook is in what SGLang will call.

    Raises:
        RuntimeError: names the hooks that did not take.
    """
    missing = [target.path for target in targets if not _runs(target.path)]
    if missing:
        raise RuntimeError(
            f"--enable-metasoft: these hooks did not take on SGLang {version('sglang')}, or another plugin has "
            f"replaced what they were in: {', '.join(missing)}"
        )


def _runs(path: str) -> bool:
    """Whether the function at ``path``, as it is now, calls our hook, directly or through what others wrapped it in."""
    hook = _hooks.get(path)
    owner, name = path.rsplit(".", 1)
    if hook is None:
        return False
    try:
        left = [getattr(resolve_name(owner), name)]
    except (ImportError, AttributeError):
        return False
    seen: set[int] = set()
    while left:
        found = left.pop()
        if found is hook or type(found) is MethodType and found == hook:
            return True
        if id(found) not in seen:
            seen.add(id(found))
            left += _parts(found, name)
    return False


def _parts(wrapper: Any, name: str) -> Iterator[Any]:
    """What a function, method or other callable may call on: a wrapper of ``name``, as Python knows it."""
    if isinstance(wrapper, MethodType):
        yield wrapper.__func__
        yield wrapper.__self__
    elif isinstance(wrapper, functools.partial):
        yield from (wrapper.func, *wrapper.args, *wrapper.keywords.values())
    elif isinstance(wrapper, FunctionType):
        # Not __wrapped__: what a plugin has replaced is still there.
        for cell in wrapper.__closure__ or ():
            with contextlib.suppress(ValueError):  # an empty cell
                yield cell.cell_contents
        yield from wrapper.__defaults__ or ()
        kept = (wrapper.__globals__.get(other) for other in wrapper.__code__.co_names)
        yield from (value for value in kept if getattr(value, "__name__", None) == name)
    elif callable(wrapper) and not isinstance(wrapper, type):
        yield from (value for value in getattr(wrapper, "__dict__", {}).values() if callable(value))
