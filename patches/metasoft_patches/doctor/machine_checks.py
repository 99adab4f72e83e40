"""Checks of the machine and its installation; SGLang is not imported for them."""

import importlib
import importlib.metadata
import importlib.util
import os
import sys
from typing import NamedTuple

import torch

from metasoft_patches import compat
from metasoft_patches.adapter import folder_of
from metasoft_patches.hooks.contract import broken_targets

PYTHONS = ((3, 11), (3, 13))  # as SGLang 0.5.23 needs it
PLUGINS = {"sglang.srt.plugins": "metasoft", "sglang.srt.platforms": "metasoft_cpu"}


class Check(NamedTuple):
    """One finding."""

    name: str
    status: str  # ok, problem, skipped
    found: str
    remedy: str | None = None


def machine() -> list[Check]:
    """All checks that need no model."""
    return [python(), sglang(), plugin(), hooks(), accelerator(), library("triton"), library("flashinfer-python")]


def python() -> Check:
    found = ".".join(map(str, sys.version_info[:3]))
    if PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
        return Check("python", "ok", found)
    first, last = (".".join(map(str, version)) for version in PYTHONS)
    return Check("python", "problem", found, f"install Python {first} to {last}")


def sglang() -> Check:
    """Whether a supported SGLang is installed."""
    wanted = f"pip install sglang=={compat.SUPPORTED_SGLANG[0]}"
    installed = _version("sglang")
    if installed is None:
        return Check("sglang", "problem", "not installed", wanted)
    tested = compat.tested_version(installed)
    if tested is None:
        supported = ", ".join(compat.SUPPORTED_SGLANG)
        return Check("sglang", "problem", f"{installed}; supported: {supported}", wanted)
    return Check("sglang", "ok", installed if installed == tested else f"{installed}, a build of {tested}")


def plugin() -> Check:
    """Whether SGLang will find this package."""
    missing = [name for group, name in PLUGINS.items() if not importlib.metadata.entry_points(group=group, name=name)]
    if missing:
        found = f"entry points missing: {', '.join(missing)}"
        return Check("plugin", "problem", found, "reinstall sglang-metasoft: pip install --force-reinstall --no-deps .")
    allowed = {name.strip() for name in os.getenv("SGLANG_PLUGINS", "").split(",") if name.strip()}
    left_out = [name for name in PLUGINS.values() if allowed and name not in allowed]
    if left_out:
        found = f"SGLANG_PLUGINS={os.environ['SGLANG_PLUGINS']} leaves out {', '.join(left_out)}"
        return Check("plugin", "problem", found, f"add {','.join(left_out)} to SGLANG_PLUGINS, or unset it")
    return Check("plugin", "ok", "registered with SGLang")


def hooks() -> Check:
    """Whether every place that is hooked is in SGLang's source as the adapter expects it."""
    if sglang().status != "ok":
        return Check("hooks", "skipped", "no adapter for this SGLang")
    installed = importlib.metadata.version("sglang")
    folder = folder_of(compat.check_sglang_version())
    targets = importlib.import_module(f"metasoft_patches.{folder}.targets").TARGETS
    broken = broken_targets(targets)
    if broken:
        remedy = f"SGLang's files were changed: pip install --force-reinstall --no-deps sglang=={installed}"
        return Check("hooks", "problem", "; ".join(broken), remedy)
    return Check("hooks", "ok", f"{len(targets)} of {len(targets)} fit")


def accelerator() -> Check:
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator().type
        if device == "cuda" and torch.version.hip is not None:
            found = f"{torch.cuda.get_device_name()}: nothing has been tested on ROCm"
            return Check(
                "accelerator", "problem", found, "use an NVIDIA GPU, or compare answers before relying on them"
            )
        if device == "cuda":
            return Check("accelerator", "ok", f"{torch.cuda.get_device_name()} ({torch.cuda.device_count()} in all)")
        found = f"{device}: nothing has been tested there, and the server refuses it"
        return Check("accelerator", "problem", found, "use an NVIDIA GPU, or no accelerator")
    if os.getenv("SGLANG_USE_CPU_ENGINE", "0") == "1":
        found = "none, and SGLANG_USE_CPU_ENGINE=1 asks for SGLang's own CPU engine: not tested"
        return Check("accelerator", "problem", found, "unset SGLANG_USE_CPU_ENGINE: this package brings a CPU platform")
    return Check("accelerator", "ok", "none: this package's CPU platform is used (slow; for trying and testing)")


def library(name: str) -> Check:
    """A GPU library: missing is a problem only where a GPU is."""
    installed = _version(name)
    if installed is not None:
        return Check(name, "ok", installed if torch.cuda.is_available() else f"{installed}, not used without a GPU")
    if not torch.cuda.is_available():
        return Check(name, "skipped", "not installed; not used without a GPU")
    return Check(name, "problem", "not installed", f"pip install {name}, in the version that sglang asks for")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
