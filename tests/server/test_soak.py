"""A short soak; ``make soak`` runs ten minutes of it."""

import os
from importlib.metadata import version

import pytest

from tests.soak import FAULTS, FLAGS, HOST_POOL, soak

pytestmark = pytest.mark.server

SECONDS = 30
HOST_MARKS = (pytest.mark.slow, pytest.mark.skipif(version("sglang") == "0.5.17", reason="HiCache is refused there"))
SEED = int(os.environ.get("METASOFT_FUZZ_SEED", 7))


@pytest.mark.parametrize(
    ("faults", "flags"),
    [
        (False, FLAGS),
        (True, f"{FLAGS} --metasoft-during-prefill --metasoft-min-tokens 128"),
        pytest.param(True, f"{FLAGS} {HOST_POOL}", marks=HOST_MARKS),
        pytest.param(
            False, f"{FLAGS} {HOST_POOL} --hicache-write-policy write_back --metasoft-during-prefill", marks=HOST_MARKS
        ),
    ],
    ids=["sound", "faults", "faults, host pool", "written back"],
)
def test_a_random_workload_leaves_everything_in_order(model_dir, document_ids, tmp_path, faults, flags):
    summary = soak(model_dir, document_ids, tmp_path / "server.log", SECONDS, seed=SEED, faults=faults, flags=flags)
    print(summary)
    assert not summary.failures, str(summary)
    assert summary.requests >= 40 and summary.compressed >= 10 and summary.checks >= summary.rounds >= 1, str(summary)
    assert (len(summary.faults) >= 3) == faults and set(summary.faults) <= set(FAULTS), str(summary)
