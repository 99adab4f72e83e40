"""Every kernel compiles for sm_80, sm_90 and sm_100 without a GPU, and fits: the interpreter would not notice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.compile_ahead import SHAPES, SHARED_LIMIT_BYTES

SHIPPED = {
    "attend_part", "attend_own", "merge_parts", "importance", "log_sums", "log_importance", "demote", "split_top",
    "pass_on", "biases", "move_biased", "standing_sums", "cosines", "standings",
}  # fmt: skip
KERNELS = SHIPPED | {"route", "carry", "flow", "move"}
PRODUCTS = ("attend_part", "attend_own", "importance", "route")  # on tensor cores
# Bytes of a thread's local memory: more would be an accumulator that does not fit registers.
LOCAL_LIMIT_BYTES = {80: 128, 90: 128, 100: 192}
ROOT = Path(__file__).parents[2]


def compile_shape(number: int, *flags: str) -> list[dict]:
    """In a process of its own: in this one kernels may be the interpreter's."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = f"{ROOT}:{environment.get('PYTHONPATH', '')}"
    command = [sys.executable, "-m", "tests.kernels.compile_ahead", "--shapes", str(number), *flags]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def assert_fits(rows: list[dict]) -> None:
    for row in rows:
        assert row["shared_bytes"] <= SHARED_LIMIT_BYTES[row["sm"]], row
        assert row["local_bytes"] <= LOCAL_LIMIT_BYTES[row["sm"]], row


def test_a_layer_of_llama_8b():
    rows = compile_shape(0, "--capabilities", "80", "90")
    assert {(row["kernel"], row["sm"]) for row in rows} == {(name, sm) for name in KERNELS for sm in (80, 90)}
    assert_fits(rows)
    for row in rows:
        expected = {80: "mma", 90: "wgmma"}[row["sm"]]
        assert row["tensor_core"] == (expected if row["kernel"] in PRODUCTS else ""), row


def test_the_shipped_path_on_blackwell():
    rows = compile_shape(0, "--capabilities", "100", "--kernels", *SHIPPED)
    assert {row["kernel"] for row in rows} == SHIPPED
    assert_fits(rows)
    for row in rows:
        assert row["tensor_core"] == ("tcgen05" if row["kernel"] in PRODUCTS else ""), row


@pytest.mark.parametrize("number", range(1, len(SHAPES)), ids=lambda number: "-".join(map(str, SHAPES[number])))
@pytest.mark.slow
def test_other_shapes(number):
    rows = compile_shape(number)
    assert {row["kernel"] for row in rows} == KERNELS
    assert_fits(rows)
