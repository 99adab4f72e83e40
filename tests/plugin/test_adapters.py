"""Which adapter is chosen, and what a version without one gets."""

from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

import metasoft_patches
import pytest
from metasoft_patches import compat
from metasoft_patches import cpu as cpu_platform
from metasoft_patches.adapter import folder_of, load_adapter
from metasoft_patches.hooks.install import register_hooks
from metasoft_patches.hooks.targets import FLAG_TARGETS, Target
from sglang.srt.plugins.hook_registry import HookRegistry

UNKNOWN = "SGLang 0.6.0 is not supported; supported: 0.5.23, 0.5.17"


@pytest.fixture
def registered(monkeypatch):
    """The hooks that are registered during the test, as in a process that has none yet."""
    monkeypatch.setattr(HookRegistry, "_hooks", defaultdict(list))
    monkeypatch.setattr(HookRegistry, "_patched", set())
    monkeypatch.setattr("metasoft_patches.hooks.install._hooks", {})
    monkeypatch.setattr("metasoft_patches.frontend.extend_engine", lambda: None)
    return HookRegistry._hooks


@pytest.fixture
def unknown_version(monkeypatch):
    monkeypatch.setattr(compat, "version", lambda name: "0.6.0")
    load_adapter.cache_clear()
    yield
    load_adapter.cache_clear()


def test_the_installed_version_has_its_own_adapter(registered):
    adapter = load_adapter()
    assert adapter.version == version("sglang")
    metasoft_patches.register()
    assert set(registered) == {target.path for target in adapter.targets_of("flags", "frontend")}
    assert {target.stage for target in adapter.targets} == {"flags", "frontend", "scheduler"}


def test_every_supported_version_has_a_folder():
    folders = {path.name for path in Path(metasoft_patches.__file__).parent.glob("sglang_*")}
    assert folders == {folder_of(supported) for supported in compat.SUPPORTED_SGLANG}


def test_an_unknown_version_gets_the_flags_alone(registered, unknown_version):
    metasoft_patches.register()
    assert set(registered) == {target.path for target in FLAG_TARGETS}


def test_an_unknown_version_is_refused_with_the_list_of_the_known(unknown_version, monkeypatch):
    with pytest.raises(ValueError, match=UNKNOWN):
        load_adapter()
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)
    with pytest.raises(ValueError, match=UNKNOWN):
        cpu_platform.activate()


def test_a_hook_without_a_function_is_an_error(registered):
    with pytest.raises(AttributeError, match="no_such_hook"):
        register_hooks([Target("frontend", "a.b", "after", "no_such_hook", (), "")], compat)
