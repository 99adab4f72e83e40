"""Every hook's target, its parameters and its caller, checked in the installed SGLang's source; it is not imported.

On a version that moved one of them this fails and says which, where, and what was expected. A version that has no
table yet is checked against the newest one: the failures are what its adapter has to bring.
"""

import ast
import importlib.util
from importlib.metadata import version
from pathlib import Path

import pytest
from metasoft_patches.compat import SUPPORTED_SGLANG
from metasoft_patches.hooks.contract import check_target, find, parameters

PATCHES = Path(__file__).parents[2] / "patches" / "metasoft_patches"


INSTALLED = version("sglang")


def folder_of(sglang: str) -> Path:
    return PATCHES / f"sglang_{sglang.replace('.', '_')}"


FOLDER = next(folder for folder in map(folder_of, (INSTALLED, *SUPPORTED_SGLANG)) if folder.is_dir())


def load_table(path: Path):
    """Execute a table of plain data, whose one import is the form of a table."""
    spec = importlib.util.spec_from_file_location(f"tables.{path.parent.name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TABLE = load_table(FOLDER / "targets.py")
TARGETS = TABLE.TARGETS
WHERE = f"SGLang {INSTALLED} (supported: {', '.join(SUPPORTED_SGLANG)})"


def called_names(function) -> set[str]:
    """Names called, or handed on as a value, inside a function."""
    names = {node.attr for node in ast.walk(function) if isinstance(node, ast.Attribute)}
    return names | {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.path.removeprefix("sglang.srt."))
def test_target_has_the_expected_parameters(target):
    check_target(target)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.path.removeprefix("sglang.srt."))
def test_target_is_called_where_we_think(target):
    module, qualified = target.caller.split(":")
    name = target.path.rsplit(".", 1)[1]
    if name == "__init__":
        name = target.path.rsplit(".", 2)[1]
    assert name in called_names(find(module, qualified)), f"{WHERE}: {target.caller} does not call {name}"


@pytest.mark.parametrize("supported", SUPPORTED_SGLANG)
def test_every_hook_exists(supported):
    folder = folder_of(supported)
    files = {
        "flags": [PATCHES / "frontend.py"],
        "frontend": [PATCHES / "frontend.py", PATCHES / "http" / "entry.py", folder / "hooks.py"],
        "scheduler": [PATCHES / "scheduler" / "hooks.py", folder / "hooks.py"],
    }
    defined = {
        stage: {
            node.name
            for path in paths
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }
        for stage, paths in files.items()
    }
    targets = load_table(folder / "targets.py").TARGETS
    for target in targets:
        assert target.hook in defined[target.stage], f"{target.hook} is in none of {files[target.stage]}"
    assert len({target.path for target in targets}) == len(targets)


def test_installed_sglang_is_a_supported_one():
    assert INSTALLED in SUPPORTED_SGLANG, WHERE


# What all adapters use besides hooks: a public extension point or an attribute that must keep its name.
USED = (
    *TABLE.USED,
    ("sglang.srt.mem_cache.registry:register_radix_cache_backend", ("name", "factory")),
    ("sglang.srt.mem_cache.unified_radix_cache:UnifiedRadixCache.reset", ("self",)),
    ("sglang.srt.mem_cache.common:evict_from_tree_cache", ("tree_cache", "num_tokens")),
    ("sglang.srt.mem_cache.allocator.base:BaseTokenToKVPoolAllocator.alloc", ("self", "need_size")),
    (
        "sglang.srt.mem_cache.allocator.base:BaseTokenToKVPoolAllocator.free_segment",
        ("self", "free_index", "start_pos"),
    ),
    (
        "sglang.srt.models.llama:LlamaModel.forward",
        ("self", "input_ids", "positions", "forward_batch", "input_embeds", "pp_proxy_tensors"),
    ),
)


@pytest.mark.parametrize(("path", "expected"), USED, ids=[path for path, _ in USED])
def test_used_function_has_the_expected_parameters(path, expected):
    function = find(*path.split(":"))
    assert parameters(function) == expected, f"{WHERE}: {path} takes {parameters(function)}"


@pytest.mark.parametrize(("path", "fragments"), TABLE.PINNED, ids=[path for path, _ in TABLE.PINNED])
def test_pinned_code_is_still_there(path, fragments):
    source = ast.unparse(find(*path.split(":")))
    for fragment in fragments:
        assert fragment in source, f"{WHERE}: {path} no longer has, in this order: {fragments}"
        source = source.split(fragment, 1)[1]
