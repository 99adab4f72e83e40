"""The clock of a compression: stages are summed over the layers, and it knows in which one a fault came."""

import pytest
import torch

from sglang_metasoft.pipeline.clock import StageClock


def test_a_stage_is_reported_once_with_the_time_of_all_layers():
    reported = []
    clock = StageClock(torch.device("cpu"), lambda stage, seconds: reported.append((stage, seconds)))
    for _ in range(3):
        for stage in ("probe", "score"):
            with clock(stage):
                pass
    clock.finish()
    assert [stage for stage, _ in reported] == ["probe", "score"] and all(seconds > 0 for _, seconds in reported)
    assert clock.unfinished is None


def test_the_stage_of_a_fault_is_known_until_the_next_compression():
    clock = StageClock(torch.device("cpu"), lambda stage, seconds: None)
    with clock("probe"):
        pass
    with pytest.raises(RuntimeError), clock("route"):
        raise RuntimeError
    assert clock.unfinished == "route"
    clock.drop()
    assert clock.unfinished is None
