"""Fixed seeds of the fuzzer, and all programs that once failed; `make fuzz` searches on with new seeds."""

import json
from pathlib import Path

import pytest

from tests.differential.fuzz import check, search
from tests.differential.servers import VARIANTS, Fleet

pytestmark = pytest.mark.server

VARIANT = "chunks"
SEEDS, PROGRAMS = (1, 2), 6
KEPT = sorted(Path(__file__).with_name("kept").glob("*.json"))


@pytest.fixture(scope="module")
def fleet_of(model_dir, tmp_path_factory):
    """The servers of one variant; those of the one before are stopped."""
    running: dict[str, Fleet] = {}

    def start(variant: str) -> Fleet:
        if variant not in running:
            while running:
                running.popitem()[1].stop()
            running[variant] = Fleet(model_dir, tmp_path_factory.mktemp("fleet"), variant)
        return running[variant]

    yield start
    for fleet in running.values():
        fleet.stop()


def kept_programs():
    """Those of another variant need servers of their own."""
    for path in KEPT:
        program = json.loads(path.read_text())
        marks = pytest.mark.slow if program.get("variant", VARIANT) != VARIANT else ()
        yield pytest.param(program, id=path.stem, marks=marks)


@pytest.mark.parametrize("seed", SEEDS)
def test_programs_of_a_fixed_seed_come_out_as_with_plain_sglang(fleet_of, tokenizer, document_ids, seed):
    seen = search(fleet_of(VARIANT), tokenizer, document_ids, seed, PROGRAMS)
    assert seen["programs"] >= PROGRAMS // 2 and seen["compressed"] and seen["reused"], seen


@pytest.mark.parametrize("program", kept_programs())
def test_what_once_failed_does_no_more(fleet_of, tokenizer, document_ids, program):
    assert program.get("variant", VARIANT) in VARIANTS
    check(fleet_of(program.get("variant", VARIANT)), tokenizer, document_ids, program)
