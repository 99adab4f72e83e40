"""Two plugins on one function of SGLang: both run, or the start fails by name."""

import functools
import sys
from collections import defaultdict
from types import ModuleType, SimpleNamespace

import pytest

pytest.importorskip("sglang")
from metasoft_patches.hooks import install
from metasoft_patches.hooks.install import register_hooks, verify_hooks
from metasoft_patches.hooks.targets import Target
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

MODULE = "hooked_module"


@pytest.fixture(autouse=True)
def host(monkeypatch):
    """A module with a function and a class, as SGLang has them, and a registry without hooks."""
    monkeypatch.setattr(HookRegistry, "_hooks", defaultdict(list))
    monkeypatch.setattr(HookRegistry, "_patched", set())
    monkeypatch.setattr(install, "_hooks", {})
    module = ModuleType(MODULE)

    class Batch:
        @classmethod
        def make(cls, value):
            return [cls.__name__, value]

        def step(self, value):
            return [value]

    def launch(value):
        return [value]

    module.Batch, module.launch = Batch, launch
    monkeypatch.setitem(sys.modules, MODULE, module)
    return module


PATHS = {
    "Batch.make": (lambda host: host.Batch.make(1), ["Batch", 1]),
    "Batch.step": (lambda host: host.Batch().step(1), [1]),
    "launch": (lambda host: host.launch(1), [1]),
}


class Ours:
    """As SchedulerHooks: bound methods."""

    def after(self, result, *args):
        return [*result, "ours"]

    def around(self, original, *args):
        return [*original(*args), "ours"]


def install_ours(path: str, kind: str = "after") -> list[Target]:
    targets = [Target("scheduler", f"{MODULE}.{path}", kind, kind, (), "")]
    register_hooks(targets, Ours())
    HookRegistry.apply_hooks()
    return targets


def register_theirs(path: str, kind: HookType = HookType.AROUND) -> None:
    def around(original, *args):
        return [*original(*args), "theirs"]

    hook = around if kind is HookType.AROUND else lambda result, *args: [*result, "theirs"]
    HookRegistry.register(f"{MODULE}.{path}", hook, kind)


def set_theirs(host, path: str, wrap) -> None:
    """Another plugin that sets the attribute itself."""
    owner, _, name = path.rpartition(".")
    owner = getattr(host, owner) if owner else host
    is_classmethod = isinstance(vars(owner)[name], classmethod)
    original = vars(owner)[name].__func__ if is_classmethod else getattr(owner, name)
    wrapped = wrap(original)
    setattr(owner, name, classmethod(wrapped) if is_classmethod else wrapped)


def by_closure(original):
    @functools.wraps(original)
    def wrapper(*args):
        return [*original(*args), "theirs"]

    return wrapper


class ByAttribute:
    def __init__(self, original):
        self.original = original

    def __call__(self, *args):
        return [*self.original(*args), "theirs"]


def by_partial(original):
    def call(inner, *args):
        return [*inner(*args), "theirs"]

    return functools.partial(call, original)


@pytest.mark.parametrize("kind", ["after", "around"])
@pytest.mark.parametrize("path", PATHS)
def test_alone(host, path, kind):
    verify_hooks(install_ours(path, kind))
    call, plain = PATHS[path]
    assert call(host) == [*plain, "ours"]


@pytest.mark.parametrize("kind", [HookType.AROUND, HookType.AFTER])
@pytest.mark.parametrize("path", PATHS)
def test_after_a_plugin_that_was_applied_before(host, path, kind):
    """SGLang's registry drops what is registered for a path that it has patched."""
    call, plain = PATHS[path]
    register_theirs(path, kind)
    HookRegistry.apply_hooks()
    targets = install_ours(path)
    verify_hooks(targets)
    assert call(host) == [*plain, "theirs", "ours"]
    HookRegistry.apply_hooks()
    assert call(host) == [*plain, "theirs", "ours"], "applied twice"


@pytest.mark.parametrize("path", PATHS)
def test_beside_a_plugin_that_is_applied_with_ours(host, path):
    call, plain = PATHS[path]
    register_theirs(path)
    verify_hooks(install_ours(path))
    assert call(host) == [*plain, "theirs", "ours"]


@pytest.mark.parametrize("wrap", [by_closure, ByAttribute, by_partial])
@pytest.mark.parametrize("path", ["Batch.make", "launch"])
def test_before_a_plugin_that_wraps_what_it_finds(host, path, wrap):
    if path == "Batch.make" and wrap is not by_closure:
        pytest.skip("a class method has to be a function")
    targets = install_ours(path)
    set_theirs(host, path, wrap)
    verify_hooks(targets)
    call, plain = PATHS[path]
    assert call(host) == [*plain, "ours", "theirs"]


def replaced(original):
    @functools.wraps(original)  # which keeps the original in __wrapped__, and us in there
    def wrapper(*args):
        return ["theirs"]

    return wrapper


@pytest.mark.parametrize("path", PATHS)
def test_a_plugin_that_replaces_what_it_finds_stops_the_start(host, path):
    targets = install_ours(path)
    set_theirs(host, path, replaced)
    with pytest.raises(RuntimeError, match=f"did not take on SGLang .*: {MODULE}.{path}"):
        verify_hooks(targets)


def test_a_hook_that_sglang_could_not_apply_stops_the_start(host):
    targets = [Target("scheduler", f"{MODULE}.Batch.gone", "after", "after", (), "")]
    register_hooks(targets, Ours())
    HookRegistry.apply_hooks()  # logs
    with pytest.raises(RuntimeError, match="Batch.gone"):
        verify_hooks(targets)
    host.Batch.gone = lambda self: None
    with pytest.raises(RuntimeError, match="Batch.gone"):
        verify_hooks(targets)


def test_each_process_verifies_its_own_hooks(host):
    """What another owner registered is not ours."""
    host.launch = lambda value, option=None: [value]
    register_theirs("launch", HookType.AFTER)
    HookRegistry.apply_hooks()
    with pytest.raises(RuntimeError, match="launch"):
        verify_hooks([Target("scheduler", f"{MODULE}.launch", "after", "after", (), "")])


def test_the_real_target_that_was_lost(monkeypatch):
    """Another plugin's timer around ``ForwardBatch.init_new`` cost every token after a prefix its position."""
    from metasoft_patches.adapter import load_adapter
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    monkeypatch.setattr(ForwardBatch, "init_new", ForwardBatch.__dict__["init_new"])  # put back afterwards
    path = "sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new"
    HookRegistry.register(path, lambda original, *args: "made", HookType.AROUND)
    HookRegistry.apply_hooks()
    shifted = []
    owner = SimpleNamespace(shift_positions=lambda result, *args: shifted.append(result))
    targets = [target for target in load_adapter().targets if target.path == path]
    register_hooks(targets, owner)
    HookRegistry.apply_hooks()
    verify_hooks(targets)
    assert ForwardBatch.init_new(None, None) == "made" and shifted == ["made"]


@pytest.mark.parametrize("path", PATHS)
def test_a_hook_that_is_registered_twice_runs_once(host, path):
    call, plain = PATHS[path]
    owner, targets = Ours(), [Target("scheduler", f"{MODULE}.{path}", "after", "after", (), "")]
    for _ in range(2):
        register_hooks(targets, owner)
        HookRegistry.apply_hooks()
    assert call(host) == [*plain, "ours"]
    verify_hooks(targets)
