"""The shipped compressor's ``train.sh`` makes the runs that its model card lists."""

import argparse
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from sglang_metasoft.compressor.files import SHIPPED
from sglang_metasoft.train.command import add_arguments
from sglang_metasoft.train.settings import TrainSettings

FOLDER = SHIPPED / "smollm2-135m-instruct"
ROW = re.compile(r"\| (`.+?) \| (\d+)[^|]*\| (.+?) \| ([\d +]+) \| (.+?) \| ([\d ]+) \|")
# In place of the programs that train.sh calls, which take hours: the command is written down, its run's folder made.
RECORDER = """#!/bin/sh
echo "$@" >> "$RECORDED"
while [ $# -gt 0 ]; do if [ "$1" = --output ]; then mkdir -p "$2/compressor"; fi; shift; done
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, TrainSettings]:
    """The settings of each run, as ``sglang-metasoft train`` understands the script's flags."""
    folder = tmp_path_factory.mktemp("recipe")
    for name in ("sglang-metasoft", "python"):
        (folder / name).write_text(RECORDER)
        (folder / name).chmod(0o755)
    recorded = folder / "recorded"
    environ = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "RECORDED": str(recorded)}
    subprocess.run(["bash", FOLDER / "train.sh"], cwd=folder, env=environ, check=True)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    found = {}
    for line in recorded.read_text().splitlines():
        program, *flags = shlex.split(line)
        if program == "train":
            values = vars(parser.parse_args(flags))
            settings = TrainSettings(**values | {name: tuple(values[name]) for name in ("exclude", "ratios", "init")})
            assert all(path.parent.name in found for path in settings.init), line
            found[settings.output.name] = settings
    return found


def test_each_run_of_the_card_has_its_prompts_seed_steps_cut_and_ratios(runs):
    listed = []
    for names, cases, seeds, steps, cut, ratios in ROW.findall((FOLDER / "README.md").read_text()):
        first, *rest = re.findall(r"`([\w-]+)`", names)
        several = [first, *(f"{first[:-1]}{n}" for n in range(2, int(rest[0][1:]) + 1))] if rest else [first]
        for number, name in enumerate(several):
            s = runs[name]
            assert s.cases == int(cases) and s.seed == int(seeds.split()[0]) + number, name
            assert [s.steps, s.selector_steps] == [*map(int, steps.split(" + ")), 0][:2], name
            assert (s.answer_cut == cut) if s.answer_weight else cut == "(maps alone)", name
            assert s.ratios == tuple(map(float, ratios.split())), name
        listed += several
    assert listed and set(listed) == set(runs) - {"mean", "last"}


def test_the_means_are_of_the_second_and_of_the_third_runs(runs):
    starts = {name: sorted(path.parent.name for path in runs[name].init) for name in runs}
    assert starts["mean"] == sorted(name for name in runs if name.startswith("second-"))
    assert starts["last"] == sorted(name for name in runs if name.startswith("third-"))
    assert all(starts[name] == ["first" if name.startswith("second") else "mean"] for name in runs if "-" in name)
    assert runs["mean"].total_steps == runs["last"].total_steps == 0
    assert all(s.biases_keys == (name == "last" or name.startswith("third-")) for name, s in runs.items())
    assert {s.prepared for s in runs.values()} == {Path(".train-run/prepared")}
