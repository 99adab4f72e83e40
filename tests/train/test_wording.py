"""Training has no sentence, question or filler of anything that quality is measured with."""

import ast
import random
import re
from pathlib import Path

import pytest

import sglang_metasoft.eval.tasks
from sglang_metasoft.train import requests
from sglang_metasoft.train.mix import GENERATORS

RUN_WORDS = 5  # of fixed text in common
DRAWS = 150
TASK_FILES = sorted(Path(sglang_metasoft.eval.tasks.__file__).parent.glob("*.py"))


def runs(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[n : n + RUN_WORDS]) for n in range(len(words) - RUN_WORDS + 1)}


def fixed_parts(file: Path) -> set[tuple[str, ...]]:
    """Runs of words in a module's strings, docstrings left out; a placeholder ends a run."""
    found = set()
    tree = ast.parse(file.read_text())
    documented = {ast.get_docstring(node, clean=False) for node in ast.walk(tree) if hasattr(node, "body")
                  and isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)}  # fmt: skip
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value not in documented:
            found |= {run for part in re.split(r"\{[^}]*\}", node.value) for run in runs(part)}
    return found


@pytest.fixture(scope="module")
def evaluated() -> set[tuple[str, ...]]:
    found = set().union(*map(fixed_parts, TASK_FILES))
    assert ("one", "of", "the", "special", "magic") in found, "RULER's own needle is among them"
    return found


@pytest.mark.parametrize("name", [*GENERATORS, "code"])
def test_prompts_share_no_run_of_words_with_evaluation(evaluated, name):
    generator = requests.code if name == "code" else GENERATORS[name][0]
    rng = random.Random(0)
    for _ in range(DRAWS):
        haystack = " ".join(
            f"Made{rng.randrange(900)} up{rng.randrange(900)} words{rng.randrange(900)}." for _ in range(120)
        )
        task = generator(rng, haystack)
        for text in (task.document, *(part or "" for question in task.questions for part in question)):
            assert not runs(text) & evaluated
