"""A built wheel holds all three packages and registers both entry points; the checkout shadows nothing."""

import importlib.metadata
import importlib.util
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from metasoft_patches.compat import SUPPORTED_SGLANG
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PACKAGES = ("sglang_metasoft", "metasoft_kernels", "metasoft_patches")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel, built from the source distribution and installed alone into an empty folder."""
    folder = tmp_path_factory.mktemp("wheel")
    python = [sys.executable, "-m"]
    # Without --wheel or --sdist, `build` makes the source distribution and the wheel from that.
    subprocess.run([*python, "build", "--no-isolation", "-o", folder, ROOT], check=True, capture_output=True)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "LICENSE", "pyproject.toml", "sglang_metasoft/py.typed"} <= names
    (wheel,) = folder.glob("*.whl")
    target = folder / "site"
    subprocess.run([*python, "pip", "install", "-q", "--no-deps", "--target", target, wheel], check=True)
    return target


def test_the_wheel_registers_both_entry_points(installed):
    (distribution,) = importlib.metadata.distributions(path=[str(installed)])
    found = {entry.group: (entry.name, entry.value) for entry in distribution.entry_points}
    assert found["sglang.srt.plugins"] == ("metasoft", "metasoft_patches:register")
    assert found["sglang.srt.platforms"] == ("metasoft_cpu", "metasoft_patches.cpu:activate")
    assert found["sglang_metasoft.commands"] == ("doctor", "metasoft_patches.doctor.command:main")
    assert found["console_scripts"] == ("sglang-metasoft", "sglang_metasoft.cli:main")
    (sglang,) = (need for need in map(Requirement, distribution.requires) if need.name == "sglang")
    others = [f"0.{minor}.{patch}" for minor in (4, 5, 6) for patch in range(40)]
    accepted = {version for version in (*others, *SUPPORTED_SGLANG) if version in sglang.specifier}
    assert accepted == set(SUPPORTED_SGLANG) and max(accepted, key=Version) == SUPPORTED_SGLANG[0]
    assert distribution.metadata["License-Expression"] == "Apache-2.0"


def test_the_wheel_imports_and_registers_without_the_checkout(installed, tmp_path):
    script = (
        f"import sys; sys.path.insert(0, {str(installed)!r})\n"
        f"import {', '.join(PACKAGES)}, metasoft_patches.cpu as platform\n"
        f"for module in ({', '.join(PACKAGES)}): assert module.__file__.startswith({str(installed)!r}), module\n"
        "from sglang_metasoft.data import DOCUMENT; assert len(DOCUMENT.read_text()) > 10_000\n"
        "from importlib.resources import files\n"
        "assert (files('sglang_metasoft.inspect') / 'page/page.html').is_file()\n"
        "assert (files('sglang_metasoft') / 'compressor/shipped/smollm2-135m-instruct/model.safetensors').is_file()\n"
        "assert (files('sglang_metasoft') / 'py.typed').is_file()\n"
        "from sglang_metasoft.cli import main; assert main(['doctor']) == 0\n"
        "import torch; assert (platform.activate() is None) == torch.accelerator.is_available()\n"
        "metasoft_patches.register()\n"
        "from sglang.srt.plugins.hook_registry import HookRegistry; assert len(HookRegistry._hooks) >= 6\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)


def test_the_editable_install_registers_too():
    names = {entry.name for entry in importlib.metadata.entry_points(group="sglang.srt.plugins")}
    assert "metasoft" in names


def test_the_checkout_does_not_shadow_hugging_faces_kernels():
    """transformers and SGLang import a package named ``kernels``; our folder of that name must not be it."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is None or not spec.origin.startswith(str(ROOT / "kernels"))
