"""A consolidation of one's own: a class that is named in ``CONSOLIDATIONS``, and every stage takes it."""

import pytest
import torch
from metasoft_kernels.merge import gather

from sglang_metasoft.config import CONSOLIDATIONS, MetaSoftConfig
from sglang_metasoft.consolidations import load_consolidation
from sglang_metasoft.consolidations.base import Consolidation
from sglang_metasoft.pipeline.batch import is_fused
from sglang_metasoft.pipeline.layer import compress_layer
from sglang_metasoft.pipeline.probe import make_probe
from sglang_metasoft.types import MergedKV
from tests.unit.methods import CPU, KEPT, SHAPE, TinyModel, make_job, make_method, make_pool, make_prompt, make_tensors

SINKS = 4


class Halfway(Consolidation):
    """Kept values move halfway to the mean of the dropped ones."""

    def merge(self, view, keys, values, scores, routes, gate_scale) -> MergedKV:
        kept, dropped = gather(values, routes.kept), gather(values, routes.dropped)
        return MergedKV(gather(keys, routes.kept), (kept + dropped.mean(0)) / 2)


class Oldest(Consolidation):
    """What comes first in the prompt stays; keys grow by a number of the model and the number of different tokens."""

    needs_probe = True

    def prepare(self, model) -> None:
        self.number = len(model.encode("a text of five words"))

    def extend_probe(self, probe, prompt, embed):
        return probe._replace(consolidation_inputs=prompt.span_ids.unique().numel())

    def rank(self, importance, probe):
        return -torch.arange(importance.shape[1]).float().expand_as(importance)

    def merge(self, view, keys, values, scores, routes, gate_scale) -> MergedKV:
        added = self.number + view.job.probe.consolidation_inputs
        return MergedKV(gather(keys, routes.kept) + added, gather(values, routes.kept))


@pytest.fixture(autouse=True)
def named(monkeypatch):
    for own in (Halfway, Oldest):
        monkeypatch.setitem(CONSOLIDATIONS, own.__name__.lower(), f"{__name__}:{own.__name__}")


def compress(method_name: str, consolidation: str, kept: int = KEPT):
    method = make_method(method_name, consolidation=consolidation)
    probe = make_probe(method, make_prompt())
    tensors = make_tensors(probe.embeds.shape[0])
    return compress_layer(make_job(probe, kept), *tensors, make_pool(), method, 1.0, 1)[1:3]


@pytest.mark.parametrize("name", ["metasoft", "streaming_llm"])
def test_one_that_merges_values(name):
    values = make_pool().value
    (plain, _), (routes, merged) = compress(name, "none"), compress(name, "halfway")
    assert torch.equal(routes.kept, plain.kept)
    for head in range(SHAPE.num_kv_heads):
        mean = values[routes.dropped[head], head].mean(0)
        torch.testing.assert_close(merged.value[:, head], (values[routes.kept[head], head] + mean) / 2)


def test_one_that_learns_from_the_model_and_notes_of_the_prompt_and_ranks():
    routes, merged = compress("snapkv", "oldest")
    assert routes.kept.tolist() == [list(range(KEPT))] * SHAPE.num_kv_heads
    torch.testing.assert_close(merged.key, make_pool().key[:KEPT] + 5 + len(make_prompt().span_ids))


def test_nothing_is_merged_where_nothing_is_dropped():
    span = len(make_prompt().span_ids)
    _, merged = compress("snapkv", "oldest", kept=span)
    assert torch.equal(merged.key, make_pool().key[:span])


def test_the_settings_take_it_and_the_method_says_what_has_to_run():
    assert MetaSoftConfig(consolidation="halfway").consolidation == "halfway"
    with pytest.raises(ValueError, match="one of: none, .*, least_squares, halfway, oldest"):
        load_consolidation("halfwit")
    needs = [make_method("streaming_llm", consolidation=name).runs_model for name in ("halfway", "oldest")]
    assert needs == [False, True]
    assert not is_fused(make_method("metasoft", consolidation="halfway"))
    assert is_fused(make_method("metasoft", consolidation="none"))


@pytest.mark.parametrize("name", ["halfway", "oldest", "key_bias"])
def test_one_for_an_adapter_is_another(name):
    own = make_method("metasoft", consolidation=name).consolidation
    before = dict(vars(own))
    other = own.prepared_for(TinyModel(CPU))
    assert type(other) is type(own) and other is not own and vars(own) == before
    assert own.learns_from_model is (name != "halfway")
