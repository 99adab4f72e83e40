"""The shipped compressor's ``train.sh`` runs the fit that its model card and its report tell of."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from sglang_metasoft.compressor.files import SHIPPED
from sglang_metasoft.train import fit

FOLDER = SHIPPED / "smollm2-135m-instruct"
# In place of the programs that train.sh calls, which take an hour: the command is written down.
RECORDER = """#!/bin/sh
echo "$@" >> "$RECORDED"
"""


@pytest.fixture(scope="module")
def commands(tmp_path_factory) -> list[list[str]]:
    """What the script calls, in order."""
    folder = tmp_path_factory.mktemp("recipe")
    for name in ("sglang-metasoft", "python"):
        (folder / name).write_text(RECORDER)
        (folder / name).chmod(0o755)
    recorded = folder / "recorded"
    environ = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "RECORDED": str(recorded)}
    subprocess.run(["bash", FOLDER / "train.sh"], cwd=folder, env=environ, check=True)
    return [shlex.split(line) for line in recorded.read_text().splitlines()]


def test_the_script_fits_as_the_report_says(commands):
    *before, (program, *arguments) = commands
    assert program == "fit" and ["demo-model"] in before and ["eval-data"] in before
    args = fit._parse(arguments)
    facts = json.loads((FOLDER / "report.json").read_text())["facts"]
    assert (args.seed, args.device, args.dtype) == (facts["seed"], facts["device"], facts["dtype"])
    assert 0.8 * args.minutes <= facts["minutes"] <= 1.1 * args.minutes
    assert [str(path) for path in args.data] == [facts["texts"]]
    assert args.exclude == [Path(".eval-data")], "evaluation's texts must not be trained on"


def test_the_card_and_the_configuration_say_what_the_report_found(commands):
    card = (FOLDER / "README.md").read_text()
    facts = json.loads((FOLDER / "report.json").read_text())["facts"]
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["report"] == {"kept": facts["kept"], "limit_ratio": facts["limit_ratio"]}
    said = re.search(r"(\d+) prompts, (\d+) steps, ([\d.]+) minutes", card)
    assert said, card
    assert said.groups() == (str(facts["training prompts"]), str(facts["steps"]), str(facts["minutes"]))
    for ratio, places in facts["kept"].items():
        row = f"| {ratio}× | {100 * places['inside']:.0f} | {100 * places['after']:.0f} |"
        assert row in card, row
