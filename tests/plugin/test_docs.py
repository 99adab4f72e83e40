"""The documentation builds without a warning, and what it quotes is what the code says."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from metasoft_patches.metrics import METRICS

from sglang_metasoft.config import settings_of
from sglang_metasoft.types import Bypass

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_tables_are_made_from_the_code(site):
    settings = (site / "settings" / "index.html").read_text()
    assert all(f"<code>{name}</code>" in settings for name in (*settings_of(), *(reason.value for reason in Bypass)))
    operating = (site / "operating" / "index.html").read_text()
    assert all(f"sglang:metasoft_{metric.name}" in operating for metric in METRICS)
    for page in site.rglob("*.html"):
        assert "generated:" not in page.read_text(), page


def test_names_and_figures_in_tables_are_not_broken(site):
    settings, quality = ((site / page / "index.html").read_text() for page in ("settings", "quality"))
    assert '<td class="name"><code>during_prefill</code></td>' in settings
    assert re.search(r'<td class="figure">\d+ \(\d+–\d+\)</td>', quality)
    troubleshooting = (site / "troubleshooting" / "index.html").read_text()
    assert '<td class="name"><code>unrecognized' not in troubleshooting  # a message wraps at its spaces


def test_the_committed_tables_are_those_of_the_code():
    """If not: ``python docs/hooks.py``."""
    hooks = runpy.run_path(str(ROOT / "docs" / "hooks.py"))
    pages = {path.name: path.read_text() for path in (ROOT / "docs").glob("*.md")}
    found = [name for text in pages.values() for name in re.findall(r"<!-- generated: (\w+) -->", text)]
    assert sorted(found) == sorted(hooks["TABLES"])
    for name, text in pages.items():
        assert hooks["filled"](text) == text, name


def test_quoted_messages_are_the_codes_own():
    """Each piece of a message between the ``…`` occurs in the source."""
    folders = ("sglang_metasoft", "patches")
    source = "\n".join(path.read_text() for folder in folders for path in (ROOT / folder).rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # adjacent literals are one
    source = re.sub(r"\{ENABLE_FLAG\}", "--enable-metasoft", source)
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)
    assert len(messages) > 15
    for message in messages[1:]:  # the first is argparse's own
        for piece in message.split("…"):
            assert piece.strip() in source, f"{piece!r} of {message!r}"
