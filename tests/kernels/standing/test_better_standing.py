"""The better of two standings, by the window's attention and by the key, against torch, for ragged batches."""

import pytest
import torch
from metasoft_kernels import parts
from metasoft_kernels.ragged import ragged
from metasoft_kernels.standing import fused, naive

from tests.kernels.cases import DEVICE, Case, every_case, make_pool, nan_memory, randn


@every_case
def test_better_standing(case, monkeypatch):
    monkeypatch.setattr(parts, "PROGRAMS", 24)  # several tiles a part
    pool = make_pool(case, case.lengths)
    mass = torch.rand(case.groups, sum(case.lengths)).to(DEVICE) ** 9  # some of it below the floor
    (span,) = ragged(torch.device(DEVICE), case.lengths)
    nan_memory(monkeypatch)
    scored = fused.better_standing(mass, pool.key, pool.slots, span)
    assert scored.attention is mass and not scored.is_log
    for own in span.ranges():
        keys = pool.key[pool.slots[own]].float().transpose(0, 1)
        expected = naive.better_standing(mass[:, own], keys)
        torch.testing.assert_close(scored.importance[:, own], expected, atol=2e-4, rtol=1e-4)


def pooled(mass):
    return torch.nn.functional.avg_pool1d(mass, 7, 1, 3, count_include_pad=False)


def test_a_quarter_by_attention_and_the_rest_by_keys():
    mass, keys = torch.rand(1, 4000).exp(), torch.randn(1, 4000, 64) + 1
    best = naive.better_standing(mass, keys)[0].argsort(descending=True)[:1000]
    seen = naive.above(
        torch.nn.functional.avg_pool1d(mass.unsqueeze(1), 7, 1, 3, count_include_pad=False).squeeze(1).log()
    )
    apart = naive.above(-naive.cosine_to_anchor(keys))
    by_attention = (naive.UNLIKE_FOR_ONE * seen[0, best] < apart[0, best]).float().mean()
    assert 0.2 < by_attention < 0.3


def test_keys_that_all_point_one_way_leave_the_choice_to_attention():
    mass, keys = torch.rand(1, 500) + 0.1, randn(1, 1, 64).expand(1, 500, 64).cpu()
    best = naive.better_standing(mass, keys)[0].argsort(descending=True, stable=True)[:20]
    assert set(best.tolist()) == set(pooled(mass)[0].argsort(descending=True)[:20].tolist())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_a_number_stays_in_its_request(bad):
    case = Case(40, 1, 1, 64, 1, torch.float32)
    pool, mass = make_pool(case, [40, 30]), torch.rand(1, 70).to(DEVICE)
    (span,) = ragged(torch.device(DEVICE), [40, 30])
    sound = fused.better_standing(mass.clone(), pool.key, pool.slots, span).importance
    mass[0, 5] = bad
    importance = fused.better_standing(mass, pool.key, pool.slots, span).importance
    assert torch.equal(importance[:, 40:], sound[:, 40:])
