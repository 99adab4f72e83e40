"""What follows from the settings of a training run."""

from pathlib import Path

import pytest

from sglang_metasoft.train.settings import TrainSettings


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({}, True), ({"gate": 1.0}, False), ({"gate": 1.0, "consolidation": "key_bias"}, True),
        ({"consolidation": "none"}, False), ({"method": "judge_q"}, False),
    ],
)  # fmt: skip
def test_losses_reckon_with_the_consolidation_that_the_server_will_choose(told, expected):
    assert TrainSettings(model="m", data=Path("d"), output=Path("o"), **told).biases_keys is expected
