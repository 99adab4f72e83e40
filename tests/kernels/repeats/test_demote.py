"""Fused ranking of repeats against torch: ties, long groups and logs included."""

import itertools

import pytest
import torch
from metasoft_kernels import parts
from metasoft_kernels.parts import Scored, importance_of
from metasoft_kernels.ragged import ragged
from metasoft_kernels.repeats import fused, naive

from tests.kernels.cases import DEVICE, GROUPS, TOKENS


def groups_of(codes: list[torch.Tensor]) -> naive.Groups:
    """Of several requests, ``[1, S]`` int64 codes each."""
    parts = zip(*(naive.group(each.to(DEVICE)) for each in codes), strict=True)
    return naive.Groups(*(torch.cat(part, dim=1) for part in parts))


def softmax_sums(logs: torch.Tensor, span, entries: int) -> Scored:
    """Logs as the entry scorer leaves them, in parts of so many entries."""
    cut = parts.Parts(entries, -(-span.longest // entries))
    sums = torch.full((2, logs.shape[0], span.num_requests, cut.number), float("nan"), device=logs.device)
    for job, own in enumerate(span.ranges()):
        for part, block in enumerate(logs[:, own].split(entries, dim=1)):
            sums[0, :, job, part] = block.amax(1)
            sums[1, :, job, part] = (block - block.amax(1, keepdim=True)).exp().sum(1)
    return Scored(torch.rand_like(logs), logs, sums, cut)


KINDS, ARE_LOGS = (1, 9, 10**6), (True, False)
COVERING = [
    (1, 8, True, 1), (63, 3, False, 9), (64, 1, True, 9), (65, 8, False, 1), (65, 3, True, 10**6),
    (1000, 1, True, 1), (1000, 3, False, 9), (4097, 1, True, 300), (4097, 1, False, 10**6),
]  # fmt: skip
CASES = COVERING if DEVICE == "cpu" else list(itertools.product(TOKENS, GROUPS, ARE_LOGS, KINDS))


@pytest.mark.parametrize(("tokens", "heads", "is_log", "kinds"), CASES)
def test_demote(tokens, heads, is_log, kinds):
    lengths = [max(1, tokens // 3), tokens, 1]
    (span,) = ragged(torch.device(DEVICE), lengths)
    codes = [torch.randint(kinds, (1, length)) - kinds // 2 for length in lengths]
    values = torch.randn(heads, span.total).to(DEVICE)
    scored = softmax_sums(3 * values, span, 128) if is_log else Scored(values.abs(), values.abs())
    ours = fused.demote(scored, groups_of(codes), span)
    importance = importance_of(scored, span)
    for own, code in zip(span.ranges(), codes, strict=True):
        expected = naive.demote(importance[:, own], naive.group(code.to(DEVICE)).numbers[0])
        torch.testing.assert_close(ours[:, own], expected, atol=1e-9, rtol=1e-5)


def test_of_equal_entries_the_earlier_one_comes_first():
    (span,) = ragged(torch.device(DEVICE), [300])
    importance = torch.randint(3, (2, 300)).float().to(DEVICE)
    codes = torch.randint(4, (1, 300))
    ours = fused.demote(Scored(importance, importance), groups_of([codes]), span)
    expected = naive.demote(importance, naive.group(codes.to(DEVICE)).numbers[0])
    torch.testing.assert_close(ours, expected)


def test_what_is_not_finite_counts_as_nothing():
    (span,) = ragged(torch.device(DEVICE), [4])
    importance = torch.tensor([[float("nan"), 1.0, float("inf"), 4.0]]).to(DEVICE)
    ours = fused.demote(Scored(importance, importance), groups_of([torch.tensor([[5, 5, 6, 5]])]), span)
    torch.testing.assert_close(ours.cpu(), torch.tensor([[0.0, 0.5, 0.0, 20**0.5]]))


@pytest.mark.parametrize("codes", [[3, 3, -1, 3, 7, -1], [4], [2, 2, 2]])
def test_groups_are_side_by_side_and_numbered(codes):
    groups = naive.group(torch.tensor([codes]))
    order, first, end = (part[0].tolist() for part in groups)
    assert [codes[entry] for entry in order] == sorted(codes)
    assert all(a < b for a, b in zip(order, order[1:], strict=False) if codes[a] == codes[b])
    for place, entry in enumerate(order):
        together = [codes[other] for other in order[first[place] : end[place]]]
        assert together == [codes[entry]] * codes.count(codes[entry])
    numbers = groups.numbers[0].tolist()
    assert all((numbers[i] == numbers[j]) is (a == b) for i, a in enumerate(codes) for j, b in enumerate(codes))
    assert min(numbers) >= 0 and max(numbers) < len(codes)
