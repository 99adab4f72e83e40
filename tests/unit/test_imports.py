"""Who may import whom: data walks one way, and only the outermost modules know SGLang."""

import ast
import sys
from collections import Counter
from pathlib import Path

import pytest

from sglang_metasoft.cli import COMMANDS

ROOT = Path(__file__).parents[2]
PROJECT = {"sglang_metasoft", "metasoft_kernels", "metasoft_patches"}
CONVENTIONS = {"__init__", "naive", "fused", "command"}  # a package, a kernel folder's two lanes, a subcommand's entry
# Folders whose files are named after those of another one: they hold the same thing's other part.
NAMED_AFTER = {
    "kernels/metasoft_kernels/merge": "sglang_metasoft/consolidations",
    "patches/metasoft_patches/sglang_0_5_17": "patches/metasoft_patches/sglang_0_5_23",
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
    return found


def files(folder: str) -> list[Path]:
    return sorted(ROOT.joinpath(folder).rglob("*.py"))


@pytest.mark.parametrize("path", files("sglang_metasoft"), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_core_knows_neither_sglang_nor_who_does(path):
    assert not {name.split(".")[0] for name in imports(path)} & {"sglang", "metasoft_patches"}


@pytest.mark.parametrize("path", files("kernels"), ids=lambda path: str(path.relative_to(ROOT)))
def test_kernels_import_no_project_code_but_their_own(path):
    packages = {name.split(".")[0] for name in imports(path)} - sys.stdlib_module_names
    assert packages <= {"torch", "triton", "flashinfer", "metasoft_kernels"}


def test_types_and_config_import_no_project_code():
    for name in ("types.py", "config.py"):
        assert not {module.split(".")[0] for module in imports(ROOT / "sglang_metasoft" / name)} & PROJECT


def test_targets_and_prefixes_need_neither_torch_nor_sglang():
    tables = ROOT.joinpath("patches/metasoft_patches").rglob("targets.py")
    for path in (*tables, ROOT / "patches/metasoft_patches/cache/prefix_index.py"):
        assert not {module.split(".")[0] for module in imports(path)} & {"torch", "sglang"}


@pytest.mark.parametrize("path", files("patches"), ids=lambda path: str(path.relative_to(ROOT)))
def test_only_a_versions_own_modules_name_it(path):
    """Everything outside ``sglang_<version>/`` is the same code for all versions."""
    own = path.parent.name if path.parent.name.startswith("sglang_") else None
    for module in imports(path):
        folders = {part for part in module.split(".") if part.startswith("sglang_0")}
        assert folders <= {own}, f"{path} imports {module}"


def test_no_module_is_long():
    for folder in ("sglang_metasoft", "kernels", "patches"):
        for path in files(folder):
            assert len(path.read_text().splitlines()) <= 400, path


def test_no_file_name_is_met_three_times():
    """A name is a first guess. Where a folder follows another's names on purpose, the two count once."""
    places = set()
    for path in (*files("sglang_metasoft"), *files("kernels"), *files("patches")):
        folder = str(path.parent.relative_to(ROOT))
        places.add((NAMED_AFTER.get(folder, folder), path.stem))
    counts = Counter(name for _, name in places if name not in CONVENTIONS)
    assert {name: count for name, count in counts.items() if count > 2} == {}


def test_a_subcommand_is_entered_by_its_packages_command_file():
    entries = {target.split(":")[0] for target, _ in COMMANDS.values() if target}
    named = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files("sglang_metasoft")}
    assert {module for module in named if module.endswith((".command", ".commands"))} <= entries
