"""The losses: of maps, and with keys that carry what is dropped, as the server will."""

import pytest
import torch
from metasoft_kernels.bias.naive import LARGEST_BIAS, log_biases

from sglang_metasoft.consolidations.repeats import demote_repeats, find_repeats
from sglang_metasoft.train import key_bias
from sglang_metasoft.train.answer_check import answer_score, top, with_biases
from sglang_metasoft.train.objective import losses
from sglang_metasoft.train.student import MetaSoftStudent


def test_a_perfect_ranking_has_no_divergence_and_a_gradient_reaches_the_cut():
    target = torch.rand(2, 3, 50)
    scores = target.log().requires_grad_()
    perfect = losses(scores, target, 4)
    assert perfect.divergence.item() == pytest.approx(0, abs=1e-5)
    assert losses(torch.rand(2, 3, 50), target, 4).divergence > 0.05
    assert losses(-target.log(), target, 4).lost > perfect.lost
    perfect.lost.backward()
    assert scores.grad.abs().sum() > 0


def test_the_squared_error_is_a_share_of_the_targets_square():
    target = torch.rand(2, 3, 50)
    assert losses(target.log(), target, 4, "squared").divergence.item() == pytest.approx(0, abs=1e-6)
    one = torch.full((1, 1, 50), 1e-9)
    one[..., 30] = 1
    flat = losses(torch.zeros(1, 1, 50), one, 4, "squared").divergence.item()  # 46 entries without the sinks
    assert flat == pytest.approx((1 - 1 / 46) ** 2 + 45 / 46**2, rel=1e-4)


def test_repeats_stand_back_in_training_as_in_the_server():
    importance, kinds = torch.rand(2, 3, 50), torch.randint(0, 20, (50,))
    ours = key_bias.favour(importance.log(), kinds)
    theirs = torch.stack([demote_repeats(layer, kinds) for layer in importance])
    torch.testing.assert_close(ours.exp(), theirs)
    torch.testing.assert_close(key_bias.favour(importance.log() - 90, kinds), ours - 90)  # up to a constant


def test_attention_is_lost_with_the_last_of_a_kind():
    scores, target = torch.randn(2, 3, 50) * 400, torch.rand(2, 3, 50)  # far from the cut: as good as hard
    kept = scores[..., 4:].topk(23).indices.flatten(0, 1) + 4
    for kinds in (torch.arange(50), torch.randint(0, 25, (50,))):
        shares = []
        for row, wanted in zip(kept, target.flatten(0, 1), strict=True):
            is_gone = (kinds[:, None] != kinds[row]).all(1)
            shares.append(wanted[4:][is_gone[4:]].sum() / wanted[4:].sum())
        ours = key_bias.lost(scores, target, 2, kinds)
        assert ours.item() == pytest.approx(sum(shares).item() / len(shares), abs=0.02)
    each = key_bias.lost(scores, target, 2, torch.arange(50))
    torch.testing.assert_close(each, losses(scores, target, 2).lost)


def test_what_stays_carries_in_training_what_it_carries_in_the_server():
    kinds = torch.cat([torch.arange(4), 4 + torch.arange(25).repeat(2)])  # four sinks and two of each
    mass = torch.rand(2, 3, 54)
    picked = torch.where(torch.rand(2, 3, 25) < 0.5, torch.arange(25), torch.arange(25, 50)).sort(-1).values
    kept = torch.cat([torch.arange(4).expand(2, 3, -1), 4 + picked], -1)
    cut = torch.full_like(mass, -60.0).scatter_(2, kept, 0.0).requires_grad_()
    ours = key_bias.carry(cut, mass, kinds)
    expected = torch.stack([log_biases(m, k, kinds[None], 4) for m, k in zip(mass, kept, strict=True)])
    torch.testing.assert_close(ours.gather(2, kept), expected)
    assert expected.max() > 0 and ours.scatter(2, kept, -60.0).max() < -50
    ours.sum().backward()
    assert cut.grad.isfinite().all() and cut.grad.abs().sum() > 0


def test_a_kind_fades_as_a_whole_and_only_far_below_the_cut():
    left = torch.cat([torch.zeros(2, 3, 4), -9 * torch.rand(2, 3, 50)], -1)
    mass = torch.rand(2, 3, 54)
    alone = key_bias.carry(left, mass, torch.arange(54))
    torch.testing.assert_close(alone, (left + LARGEST_BIAS).clamp_max(0))
    pairs = torch.cat([torch.arange(4), 4 + torch.arange(25).repeat(2)])
    ours = key_bias.carry(left, mass, pairs)
    for i in range(4, 29):
        (a, b), (m, n) = left[..., [i, i + 25]].unbind(-1), mass[..., [i, i + 25]].unbind(-1)
        bias = ((m + n) / (m * a.exp() + n * b.exp())).log().clamp_max(LARGEST_BIAS)
        torch.testing.assert_close(ours[..., i], a + bias)
        torch.testing.assert_close(ours[..., i + 25], b + bias)


def test_answers_over_biased_entries(backbone, prepared):
    """Everything kept carries nothing; one of two equal entries carries both."""
    for context in (prepared.inside(0, 16), prepared.boundary(16)):
        span = len(context.span_ids)
        full = answer_score(backbone, context)
        repeats = find_repeats(context.span_ids)
        everything = top(context.target, span, repeats)
        carried = with_biases(context.target, everything, repeats)
        assert carried.log_keep.abs().max() == 0
        assert answer_score(backbone, context, attend=carried).loss == pytest.approx(full.loss, abs=1e-4)
        some = with_biases(context.target, top(context.target, span // 2, repeats), repeats).log_keep
        assert (some == float("-inf")).sum(-1).unique().tolist() == [span - span // 2] and some.max() > 0


def test_the_student_carries_what_the_method_in_the_server_says(backbone, prepared):
    context = prepared.inside(0, 16)
    student = MetaSoftStudent.create(backbone, 4, 4, "both", 3)
    student.calibrate(backbone, [context], 1)
    mass = student.probe(backbone, context).detach()
    with torch.no_grad():
        refined = student.refine(mass, context, backbone)
        torch.testing.assert_close(
            student.carried(mass, refined), (mass * refined.softmax(-1)).sqrt(), atol=1e-6, rtol=1e-4
        )
    bare = MetaSoftStudent.create(backbone, 4, 0, "both", 3)
    assert bare.carried(mass, bare.refine(mass, context, backbone)) is mass
