"""One layer's stages together: what is not finite is reported and does no harm."""

import pytest
import torch

from sglang_metasoft.config import METHODS, MetaSoftConfig
from sglang_metasoft.methods.base import Method
from sglang_metasoft.pipeline.layer import compress_layer
from sglang_metasoft.types import Job, LayerPool, ModelShape, Plan, Probe, Scores
from tests.unit.methods import make_method, make_view

SHAPE = ModelShape("tiny", 100, 48, 2, 6, 3, 16)
SPAN, KEPT, PROBE = 60, 20, 8


class Plain(Method):
    """The base's own importance, spoilt at one entry if asked to."""

    spoilt: float | None = None

    def probe(self, prompt):
        raise NotImplementedError

    def score(self, *args) -> Scores:
        importance = super().score(*args).importance
        if self.spoilt is not None:
            importance[1, 7] = self.spoilt
        return Scores(importance)


def run(pool: LayerPool, spoilt: float | None = None):
    device = pool.key.device
    method = Plain(MetaSoftConfig(), SHAPE, None, device)
    method.spoilt = spoilt
    slots = torch.arange(SPAN, device=device)
    job = Job(Plan(0, SPAN, KEPT, 4), Probe(torch.empty(PROBE, 48), SPAN, SPAN), slots, slots, slots[:KEPT])
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(PROBE, heads, 16, generator=generator).to(device) for heads in (6, 3, 3))
    return compress_layer(job, q, k, v, pool, method, 1.0)


@pytest.fixture
def pool():
    return LayerPool(torch.randn(SPAN, 3, 16), torch.randn(SPAN, 3, 16), 0.25, 1.0, 1.0)


def test_finite_numbers_are_said_to_be_finite(pool):
    *_, is_finite = run(pool)
    assert is_finite.item() is True


@pytest.mark.parametrize("spoilt", [float("nan"), float("inf"), float("-inf")])
def test_importance_that_is_not_finite_counts_as_none(pool, spoilt):
    _, routes, merged, is_finite = run(pool, spoilt)
    _, expected_routes, expected, _ = run(pool, 0.0)
    assert is_finite.item() is False
    assert torch.equal(routes.kept, expected_routes.kept) and torch.equal(merged.value, expected.value)
    assert 7 not in routes.kept[1]


def test_a_merged_value_that_is_not_finite_stays_as_it_was(pool):
    _, routes, expected, _ = run(pool)
    dropped = routes.dropped[2, 0]
    pool.value[dropped, 2] = float("nan")
    _, routes, merged, is_finite = run(pool)
    assert is_finite.item() is False and merged.value.isfinite().all()
    original = pool.value[:, 2][routes.kept[2]]
    changed = (merged.value[:, 2] != expected.value[:, 2]).any(1)
    assert changed.any() and torch.equal(merged.value[changed, 2], original[changed])


@pytest.mark.parametrize("name", METHODS)
def test_no_method_hides_what_is_not_finite(name):
    """SnapKV pools over neighbours: a NaN there must come out as one."""
    method = make_method(name)
    view = make_view(PROBE)
    if name == "random":  # its probe carries what it draws from
        job = view.job
        view = view._replace(job=job._replace(probe=job.probe._replace(method_inputs=torch.tensor(7))))
    for tensor in (view.q, view.lse, view.pool.key):
        tensor[0, 0] = float("nan")
    scores = method.score_layer(view)
    assert not all(tensor.isfinite().all() for tensor in scores if tensor is not None) or name == "streaming_llm"
