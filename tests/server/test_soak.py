"""A short soak; ``make soak`` runs ten minutes of it."""

import os

import pytest

from tests.soak import FAULTS, FLAGS, soak

pytestmark = pytest.mark.server

SECONDS = 30
SEED = int(os.environ.get("METASOFT_FUZZ_SEED", 7))


@pytest.mark.parametrize(
    ("faults", "flags"),
    [(False, FLAGS), (True, f"{FLAGS} --metasoft-during-prefill --metasoft-min-tokens 128")],
    ids=["sound", "faults"],
)
def test_a_random_workload_leaves_everything_in_order(model_dir, document_ids, tmp_path, faults, flags):
    summary = soak(model_dir, document_ids, tmp_path / "server.log", SECONDS, seed=SEED, faults=faults, flags=flags)
    print(summary)
    assert not summary.failures, str(summary)
    assert summary.requests >= 40 and summary.compressed >= 10 and summary.checks >= summary.rounds >= 1, str(summary)
    assert (len(summary.faults) >= 3) == faults and set(summary.faults) <= set(FAULTS), str(summary)
