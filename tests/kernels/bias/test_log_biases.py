"""Fused biases against torch: groups over many tiles, sinks, and attention that is nothing."""

import itertools

import pytest
import torch
from metasoft_kernels import parts
from metasoft_kernels.bias import fused, naive
from metasoft_kernels.parts import Scored, importance_of
from metasoft_kernels.ragged import ragged
from metasoft_kernels.repeats.naive import Groups, group
from metasoft_kernels.select import naive as select

from tests.kernels.cases import DEVICE, GROUPS, TOKENS
from tests.kernels.repeats.test_demote import softmax_sums

SINKS = [0, 3, 1]


def choose(heads: int, lengths: list[int], kept: list[int], span):
    """Kept rows on the span axis, and for each entry whether it stays; chosen at random but for the sinks."""
    rows, is_kept = [], torch.zeros(heads, span.total, dtype=torch.int8, device=DEVICE)
    for own, count, sinks in zip(span.ranges(), kept, SINKS, strict=False):
        chosen = select.split_top(torch.rand(heads, own.stop - own.start), count, min(sinks, count))[0].to(DEVICE)
        is_kept[:, own].scatter_(1, chosen, 1)
        rows.append(chosen + own.start)
    return torch.cat(rows, dim=1).to(torch.int32), is_kept


def assert_equal_to_torch(scored, codes, lengths, kept, heads):
    device = torch.device(DEVICE)
    span, kept_axis = ragged(device, lengths, kept)
    kept_rows, is_kept = choose(heads, lengths, kept, span)
    each = [group(code.to(DEVICE)) for code in codes]
    groups = Groups(*(torch.cat(part, dim=1) for part in zip(*each, strict=True)))
    sinks = torch.tensor(SINKS[: len(lengths)], dtype=torch.int32, device=DEVICE)
    ours = fused.log_biases(scored, is_kept, kept_rows, groups, sinks, span, kept_axis)
    mass = scored.attention
    if scored.is_log:
        mass = (mass * importance_of(scored, span)).sqrt()
    mass = mass.nan_to_num(0.0, 0.0, 0.0)
    for own, stays, mine, sink in zip(span.ranges(), kept_axis.ranges(), each, SINKS, strict=False):
        chosen = kept_rows[:, stays].long() - own.start
        expected = naive.log_biases(mass[:, own], chosen, mine.numbers, sink)
        torch.testing.assert_close(ours[:, stays], expected, atol=2e-5, rtol=1e-4)
    return ours


KINDS, ARE_LOGS = ((1, 1), (40, 5), (10**6, 10**5)), (True, False)
COVERING = [
    (1, 8, True, (1, 1)), (63, 3, False, (40, 5)), (64, 1, True, (40, 5)), (65, 8, False, (1, 1)),
    (65, 3, True, (10**6, 10**5)), (1000, 1, True, (1, 1)), (1000, 3, False, (40, 5)), (4097, 1, True, (900, 30)),
    (4097, 1, False, (10**6, 10**5)),
]  # fmt: skip
CASES = COVERING if DEVICE == "cpu" else list(itertools.product(TOKENS, GROUPS, ARE_LOGS, KINDS))


@pytest.mark.parametrize(("tokens", "heads", "is_log", "kinds"), CASES, ids=str)
def test_log_biases(tokens, heads, is_log, kinds, monkeypatch):
    monkeypatch.setattr(parts, "PROGRAMS", 24)  # several tiles a part
    lengths = [max(1, tokens // 3), tokens, 1]
    kept = [-(-length // 4) for length in lengths]
    codes = [torch.stack([torch.randint(kind, (length,)) for kind in kinds]) for length in lengths]
    (span,) = ragged(torch.device(DEVICE), lengths)
    attention = torch.rand(heads, span.total).to(DEVICE) ** 4
    scored = Scored(attention, attention)
    if is_log:
        scored = softmax_sums(2 * torch.randn(heads, span.total).to(DEVICE), span, 256)._replace(attention=attention)
    assert_equal_to_torch(scored, codes, lengths, kept, heads)


def test_what_has_no_attention_carries_nothing():
    attention = torch.rand(2, 500).to(DEVICE)
    attention[:, ::3] = 0
    attention[0, 7], attention[1, 8] = float("nan"), float("inf")
    codes = [torch.randint(60, (2, 500))]
    ours = assert_equal_to_torch(Scored(attention, attention), codes, [500], [125], 2)
    assert (ours == 0).sum() > 50 and (ours > 0).sum() > 50
    nothing = torch.zeros(2, 500).to(DEVICE)
    assert not assert_equal_to_torch(Scored(nothing, nothing), codes, [500], [125], 2).any()


def test_memory_that_is_lent_is_used():
    attention, lent = torch.rand(1, 100).to(DEVICE), torch.full((1, 100), 5.0).to(DEVICE)
    span, kept = ragged(torch.device(DEVICE), [100], [25])
    rows, is_kept = choose(1, [100], [25], span)
    groups = group(torch.randint(9, (2, 100)).to(DEVICE))
    args = (Scored(attention, attention), is_kept, rows, groups, torch.zeros(1, dtype=torch.int32, device=DEVICE))
    assert torch.equal(fused.log_biases(*args, span, kept), fused.log_biases(*args, span, kept, lent))
    assert (lent != 5.0).all()
