"""The entry scorer in training and in the server."""

import pytest
import torch
from metasoft_kernels.score import importance

from sglang_metasoft.compressor.entry_scorer import EntryScorer
from sglang_metasoft.config import MetaSoftConfig
from sglang_metasoft.consolidations import load_consolidation
from sglang_metasoft.methods.metasoft import MetaSoft
from sglang_metasoft.train.student import MetaSoftStudent
from sglang_metasoft.types import Job, LayerPool, LayerView, Plan, Probe


@pytest.fixture
def scorer():
    generator = torch.Generator().manual_seed(5)
    module = EntryScorer(3, 2, 12, 4)
    module.initialize(torch.zeros(3, 2, 20), torch.ones(3, 2, 20), generator)
    return module


def entries(generator=None):
    return torch.rand(3, 2, 30) + 0.01, torch.randn(3, 2, 30, 12), torch.randn(3, 2, 30, 12)


def test_the_entry_scorer_starts_as_the_probes_own_ranking(scorer):
    mass, keys, values = entries()
    out = scorer(mass, keys, values, 1)
    torch.testing.assert_close(out - out.mean(-1, keepdim=True), (mass.log() - mass.log().mean(-1, keepdim=True)))


def test_a_rank_of_tensor_parallelism_computes_its_heads_of_the_whole(scorer):
    torch.nn.init.normal_(scorer.out)
    mass, keys, values = entries()
    whole = scorer(mass, keys, values, 0)
    part = scorer(mass[2, 1:], keys[2, 1:], values[2, 1:], 0, (2, slice(1, 2)))
    torch.testing.assert_close(part, whole[2, 1:])


def test_moving_an_entry_does_not_change_its_score(scorer):
    torch.nn.init.normal_(scorer.out)
    mass, keys, values = entries()
    angle = torch.rand(6) * 6
    a, b = keys[..., :6], keys[..., 6:]
    turned = torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)
    torch.testing.assert_close(scorer(mass, turned, values, 0), scorer(mass, keys, values, 0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("at_boundary", [False, True])
def test_the_server_ranks_as_training_does(scorer, at_boundary):
    torch.nn.init.normal_(scorer.out)
    method = MetaSoft.__new__(MetaSoft)
    method.config, method.shape, method.device = MetaSoftConfig(consolidation="none"), None, None
    method.soft_tokens = type("Soft", (), {"scorer": scorer})
    q, lse = torch.randn(5, 4, 12), torch.full((5, 4), 3.0)
    pool = LayerPool(torch.randn(60, 2, 12), torch.randn(60, 2, 12), 0.3, 1.0, 1.0)
    slots = torch.randperm(60)[:30]
    job = Job(Plan(0, 30, 10, 4, at_boundary), Probe(torch.empty(5, 48), 30, 30), slots, slots, slots[:10])
    scores = method.score_layer(LayerView(job, pool, q, lse, 1))
    entry = (t[slots].transpose(0, 1) for t in pool[:2])
    expected = scorer(scores.mass, *entry, int(at_boundary), (1,)).softmax(-1)
    torch.testing.assert_close(scores.importance, expected)
    torch.testing.assert_close(scores.mass, importance(q, pool.key, slots, lse, 0.3))
    method.consolidation = load_consolidation("key_bias")(method.config, None, None)
    biased = method.score_layer(LayerView(job, pool, q, lse, 1))
    assert torch.equal(biased.importance, scores.importance)
    student = MetaSoftStudent.__new__(MetaSoftStudent)
    torch.nn.Module.__init__(student)
    student.soft = method.soft_tokens
    torch.testing.assert_close(biased.mass, student.carried(scores.mass, scores.importance.log()))
