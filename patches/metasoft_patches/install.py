"""Put hooks into SGLang, and make sure that they took: SGLang itself only logs a hook that fails."""

from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookSource, HookType

from metasoft_patches.targets import Target

SOURCE = HookSource(plugin_name="metasoft", dist_name="sglang-metasoft")


def register_hooks(targets: Iterable[Target], *owners: Any) -> None:
    """Register hooks; each is the attribute ``target.hook`` of the first of the owners that has it."""
    for target in targets:
        owner = next((owner for owner in owners if hasattr(owner, target.hook)), owners[-1])
        HookRegistry.register(target.path, getattr(owner, target.hook), HookType(target.kind), source=SOURCE)


def verify_hooks(targets: Iterable[Target]) -> None:
    """Refuse to go on unless every hook is in place.

    Raises:
        RuntimeError: names the hooks that did not take.
    """
    missing = [target.path for target in targets if target.path not in HookRegistry._patched]
    if missing:
        raise RuntimeError(
            f"--enable-metasoft: these hooks did not take on SGLang {version('sglang')}: {', '.join(missing)}"
        )
