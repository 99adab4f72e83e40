"""What a rank that cannot make a job knows of what the others embed meanwhile."""

import pytest
import torch

pytest.importorskip("sglang")
from metasoft_patches.forward.embedding import SharedEmbedding

from sglang_metasoft.config import METHODS
from sglang_metasoft.pipeline.probe import make_probe
from sglang_metasoft.types import Prompt
from tests.unit.methods import SHAPE, make_method


@pytest.mark.parametrize("consolidation", ["attention_flow", "key_bias", "least_squares"])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("span", [200, 9000])  # more than are embedded at once
def test_the_rehearsal_tells_what_is_embedded(name, consolidation, span):
    method = make_method(name, consolidation=consolidation)
    ids = torch.arange(span + 64) % SHAPE.vocab_size
    prompt = Prompt(ids[:span], ids[span:], span + 64, span + 64)
    embedded, table = [], method.embed

    def embed(ids):
        embedded.append(ids.numel())
        return table(ids)

    method.embed = SharedEmbedding(embed, SHAPE.hidden_size)
    probe = make_probe(method, prompt)
    assert method.embed.calls == len(embedded)
    tokens, rehearsed = method.embed.rehearse(lambda: make_probe(method, prompt))
    assert tokens == embedded and len(embedded) == method.embed.calls, "the rehearsal embeds nothing"
    assert rehearsed.embeds.shape == probe.embeds.shape
    assert rehearsed[1:4] == probe[1:4]


def test_a_call_that_fails_is_told_from_a_fault_between_calls():
    def fail(ids):
        raise RuntimeError("all-reduce")

    embedding = SharedEmbedding(fail, 4)
    with pytest.raises(RuntimeError):
        embedding(torch.arange(3))
    assert embedding.is_inside and embedding.calls == 0
    with pytest.raises(ValueError):
        embedding.rehearse(lambda: int("x"))
    assert not embedding.is_rehearsal
