"""The fused entry scorer against torch, for ragged batches over scattered slots."""

import pytest
import torch
from metasoft_kernels import parts
from metasoft_kernels.parts import importance_of
from metasoft_kernels.ragged import ragged
from metasoft_kernels.refine import fused, naive

from sglang_metasoft.compressor.entry_scorer import EntryScorer
from tests.kernels.cases import DEVICE, Case, every_case, make_pool, randn
from tests.kernels.launches import record

LAYERS, LAYER, HEADS_BEFORE = 2, 1, 1


def make_weights(groups: int, d: int, width: int) -> naive.Weights:
    features, heads = d + d // 2 + 2, groups + HEADS_BEFORE
    shape = (2, LAYERS, heads)
    hidden = randn(*shape, features, width) / features**0.5
    return naive.Weights(hidden, randn(*shape, width), randn(*shape, width), randn(*shape), randn(*shape))


def read(case, pool, entries):
    """K and V of some slots, ``[G, S, d]`` float32."""
    return (
        buffer[pool.slots[entries]].float().transpose(0, 1) * scale
        for buffer, scale in zip((pool.key, pool.value), case.scales, strict=True)
    )


@every_case
def test_log_importance(case, monkeypatch):
    monkeypatch.setattr(parts, "PROGRAMS", 24)  # several tiles a part
    pool, width = make_pool(case, case.lengths), 7 if case.groups == 3 else 32
    weights = make_weights(case.groups, case.d, width)
    mass = torch.rand(case.groups, sum(case.lengths)).to(DEVICE) ** 9  # some of it below the floor
    modes = [1, 0, 1]
    (span,) = ragged(torch.device(DEVICE), case.lengths)
    scored = fused.log_importance(
        mass, pool.key, pool.value, pool.slots, weights, torch.tensor(modes, dtype=torch.int32, device=DEVICE), LAYER,
        HEADS_BEFORE, span, *case.scales,
    )  # fmt: skip
    assert scored.attention is mass
    importance = importance_of(scored, span)
    for number, (mode, own) in enumerate(zip(modes, span.ranges(), strict=True)):
        at = (mode, LAYER, slice(HEADS_BEFORE, None))
        expected = naive.log_importance(mass[:, own], *read(case, pool, own), weights, at)
        torch.testing.assert_close(scored.importance[:, own], expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(importance[:, own], expected.softmax(-1), atol=1e-6, rtol=1e-3)
        count = -(-span.lengths[number] // scored.parts.entries)
        tops, totals = scored.sums[:, :, number, :count]
        assert torch.equal(tops.amax(1), scored.importance[:, own].amax(1))
        torch.testing.assert_close(
            (totals * tops.exp()).sum(1).log(), expected.logsumexp(-1), atol=1e-4, rtol=1e-4
        )  # fmt: skip


def test_the_scorer_of_a_compressor_is_the_same():
    case = Case(90, 3, 1, 64, 1, torch.bfloat16)
    pool, scorer = make_pool(case, [90]), EntryScorer(LAYERS, 4, 64, 16).to(DEVICE)
    with torch.no_grad():
        for parameter in scorer.parameters():
            parameter.copy_(randn(*parameter.shape) / 4)
        mass = torch.rand(3, 90).to(DEVICE)
        (span,) = ragged(torch.device(DEVICE), [90])
        mode = torch.tensor([1], dtype=torch.int32, device=DEVICE)
        ours = fused.log_importance(
            mass, pool.key, pool.value, pool.slots, scorer.weights, mode, LAYER, HEADS_BEFORE, span
        )
        expected = scorer(mass, *read(case, pool, slice(None)), 1, (LAYER, slice(HEADS_BEFORE, None)))
    torch.testing.assert_close(ours.importance, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_a_number_counts_as_nothing_in_its_request_alone(bad):
    case = Case(40, 1, 1, 64, 1, torch.float32)
    pool, weights = make_pool(case, [40, 30]), make_weights(1, 64, 16)
    mass = torch.rand(1, 70).to(DEVICE)
    mass[0, 5] = bad
    (span,) = ragged(torch.device(DEVICE), [40, 30])
    modes = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    scored = fused.log_importance(
        mass, pool.key, pool.value, pool.slots, weights, modes, LAYER, HEADS_BEFORE, span
    )  # fmt: skip
    importance = importance_of(scored, span)
    assert not importance[:, :40].any() and importance[:, 40:].sum().item() == pytest.approx(1)


def test_no_feature_is_kept(monkeypatch):
    """Beside the logs, a number for each part: nothing that grows with features or entries."""
    record(monkeypatch)
    pool, weights = randn(10, 1, 64), make_weights(1, 64, 32)
    (span,) = ragged(torch.device(DEVICE), [100_000])
    made, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: made.append(empty(*args, **kwargs)) or made[-1])
    mass, modes = torch.rand(1, 100_000).to(DEVICE), torch.zeros(1, dtype=torch.int32, device=DEVICE)
    scored = fused.log_importance(
        mass, pool, pool, torch.zeros(100_000).long(), weights, modes, LAYER, HEADS_BEFORE, span
    )
    assert scored.importance.numel() == 100_000
    assert sum(tensor.numel() for tensor in made) == 4 * scored.parts.number and scored.parts.number <= parts.PROGRAMS
