"""Every hook's target, its parameters and its caller, checked in SGLang's source; SGLang is not imported.

On a version that moved one of them this fails and says which, where, and what was expected.
"""

import ast
import importlib.util
from importlib.metadata import version
from pathlib import Path

import pytest

from sglang_metasoft.compat import SUPPORTED_SGLANG

ROOT = Path(importlib.util.find_spec("sglang").submodule_search_locations[0])
PATCHES = Path(__file__).parents[2] / "patches" / "metasoft_patches"


def load_targets():
    spec = importlib.util.spec_from_file_location("targets", PATCHES / "targets.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.TARGETS


TARGETS = load_targets()
WHERE = f"SGLang {version('sglang')} (supported: {', '.join(SUPPORTED_SGLANG)})"


def parse(module: str) -> ast.Module:
    path = ROOT.joinpath(*module.split(".")[1:])
    path = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
    assert path.is_file(), f"{WHERE} has no module {module}"
    return ast.parse(path.read_text())


def find(module: str, qualified: str):
    """The function or class ``qualified`` of a module, and whether it exists."""
    node = parse(module)
    for name in qualified.split("."):
        node = next(
            (
                child
                for child in node.body
                if isinstance(child, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef) and child.name == name
            ),
            None,
        )
        assert node is not None, f"{WHERE} has no {module}.{qualified}"
    return node


def split(path: str) -> tuple[str, str]:
    """Module and qualified name: the module is the longest prefix that is a file."""
    parts = path.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        if ROOT.joinpath(*parts[1:cut]).with_suffix(".py").is_file():
            return ".".join(parts[:cut]), ".".join(parts[cut:])
    raise AssertionError(f"{WHERE} has no module for {path}")


def parameters(function: ast.FunctionDef) -> tuple[str, ...]:
    args = function.args
    names = [arg.arg for arg in args.posonlyargs + args.args]
    if args.vararg:
        names.append("*" + args.vararg.arg)
    names += [arg.arg for arg in args.kwonlyargs]
    if args.kwarg:
        names.append("**" + args.kwarg.arg)
    return tuple(names)


def called_names(function) -> set[str]:
    """Names called, or handed on as a value, inside a function."""
    names = {node.attr for node in ast.walk(function) if isinstance(node, ast.Attribute)}
    return names | {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.path.removeprefix("sglang.srt."))
def test_target_has_the_expected_parameters(target):
    function = find(*split(target.path))
    assert parameters(function) == target.parameters, (
        f"{WHERE}: {target.path} takes {parameters(function)}, the hook {target.hook} expects {target.parameters}"
    )


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.path.removeprefix("sglang.srt."))
def test_target_is_called_where_we_think(target):
    module, qualified = target.caller.split(":")
    name = target.path.rsplit(".", 1)[1]
    if name == "__init__":
        name = target.path.rsplit(".", 2)[1]
    assert name in called_names(find(module, qualified)), f"{WHERE}: {target.caller} does not call {name}"


def test_every_hook_exists_and_is_used():
    sources = {
        stage: {
            node.name
            for node in ast.walk(ast.parse((PATCHES / f"{stage}.py").read_text()))
            if isinstance(node, ast.FunctionDef)
        }
        for stage in ("frontend", "scheduler")
    }
    for target in TARGETS:
        assert target.hook in sources[target.stage], f"{target.hook} is not in {target.stage}.py"
    assert len({target.path for target in TARGETS}) == len(TARGETS)


def test_installed_sglang_is_a_supported_one():
    assert version("sglang") in SUPPORTED_SGLANG, WHERE


# What the package uses besides hooks: a public extension point or an attribute that must keep its name.
USED = [
    ("sglang.srt.mem_cache.registry:register_radix_cache_backend", ("name", "factory")),
    ("sglang.srt.mem_cache.registry:create_unified_radix_cache", ("ctx", "cache_class")),
    ("sglang.srt.mem_cache.unified_radix_cache:UnifiedRadixCache.checkpoint", ("self", "req", "up_to", "**kwargs")),
    ("sglang.srt.mem_cache.unified_radix_cache:UnifiedRadixCache.reset", ("self",)),
    ("sglang.srt.mem_cache.common:evict_from_tree_cache", ("tree_cache", "num_tokens")),
    ("sglang.srt.mem_cache.allocator.base:BaseTokenToKVPoolAllocator.alloc", ("self", "need_size")),
    (
        "sglang.srt.mem_cache.allocator.base:BaseTokenToKVPoolAllocator.free_segment",
        ("self", "free_index", "start_pos"),
    ),
    ("sglang.srt.model_executor.forward_context:forward_context", ("ctx", "forward_batch")),
    (
        "sglang.srt.models.llama:LlamaModel.forward",
        ("self", "input_ids", "positions", "forward_batch", "input_embeds", "pp_proxy_tensors"),
    ),
]


@pytest.mark.parametrize(("path", "expected"), USED, ids=[path for path, _ in USED])
def test_used_function_has_the_expected_parameters(path, expected):
    function = find(*path.split(":"))
    assert parameters(function) == expected, f"{WHERE}: {path} takes {parameters(function)}"


def test_decode_graphs_copy_positions_from_the_forward_batch_at_every_replay():
    """The offset is added to a new ``ForwardBatch.positions``; a captured decode graph reads a buffer of its own."""
    module = "sglang.srt.model_executor.runner.decode_cuda_graph_runner"
    source = ast.unparse(find(module, "DecodeCudaGraphRunner._copy_replay_inputs"))
    # Skipped only for the very tensor that the buffer was filled from: never for a new one.
    guard = "if prefilled is None or forward_batch.positions is not prefilled[1]:"
    copy = "self.buffers.positions[:self.raw_num_token].copy_(forward_batch.positions)"
    assert guard in source and copy in source.split(guard)[1], f"{WHERE}: {module} fills its positions differently"
