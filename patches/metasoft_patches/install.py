"""Put hooks into SGLang, and make sure that they took: SGLang itself only logs a hook that fails."""

from collections.abc import Callable
from importlib.metadata import version

from sglang.srt.plugins.hook_registry import HookRegistry, HookSource, HookType

from metasoft_patches.targets import targets_of

SOURCE = HookSource(plugin_name="metasoft", dist_name="sglang-metasoft")


def register_hooks(stage: str, find: Callable[[str], Callable]) -> None:
    """Register the hooks of a stage; ``find`` gives the function for a hook's name."""
    for target in targets_of(stage):
        HookRegistry.register(target.path, find(target.hook), HookType(target.kind), source=SOURCE)


def verify_hooks(stage: str) -> None:
    """Refuse to go on unless every hook of the stage is in place.

    Raises:
        RuntimeError: names the hooks that did not take.
    """
    missing = [target.path for target in targets_of(stage) if target.path not in HookRegistry._patched]
    if missing:
        raise RuntimeError(
            f"--enable-metasoft: these hooks did not take on SGLang {version('sglang')}: {', '.join(missing)}"
        )
