"""What is read again behind the probe, and that it ranks nothing."""

import pytest
import torch
from metasoft_kernels.probe import attend

from sglang_metasoft.consolidations.reread import RUN_TOKENS, with_reread
from sglang_metasoft.pipeline.layer import compress_layer
from sglang_metasoft.pipeline.probe import make_probe
from sglang_metasoft.types import Job, LayerPool, Plan, Probe, Prompt
from tests.unit.methods import make_method


def embed(ids):
    return ids.float().unsqueeze(1)


def make_prompt(span: int, tail: int) -> Prompt:
    ids = torch.arange(span + tail)
    return Prompt(ids[:span], ids[span:], span + tail, span + tail)


@pytest.mark.parametrize("tail", [0, 10, 100])
@pytest.mark.parametrize(
    ("span", "tokens", "runs"),
    [(4096, 256, 4), (4096, 511, 7), (1024, 256, 2), (300, 256, 1), (64, 1, 1), (63, 256, 0)],
)
def test_the_end_and_evenly_spread_runs_are_read_again(span, tail, tokens, runs):
    probe = Probe(torch.full((3, 1), -1.0), 7, 9)
    longer = with_reread(probe, make_prompt(span, tail), embed, tokens)
    if runs == 0:
        assert longer is probe
        return
    assert longer.ranking_tokens == 3 and longer.context_slots == 7 and longer.first_position == 9
    again = longer.embeds[3:, 0].long().tolist()
    end = (span + tail) if tail else span
    last = list(range(max(end - RUN_TOKENS, span if tail else 0), end))
    assert torch.equal(longer.embeds[:3], probe.embeds) and again[-len(last) :] == last
    starts = again[: -len(last)][::RUN_TOKENS]
    assert len(starts) == runs - 1
    for start in starts:
        at = again.index(start)
        assert again[at : at + RUN_TOKENS] == list(range(start, start + RUN_TOKENS))
        assert 0 <= start <= span - RUN_TOKENS
    # As far from the beginning as from the end, and all as far from one another.
    assert all(abs(a + b - (span - RUN_TOKENS)) <= 1 for a, b in zip(starts, reversed(starts), strict=True))
    assert len({b - a for a, b in zip(starts, starts[1:])}) <= 1 or len(starts) < 3  # noqa: B905


def test_none_if_none_are_asked_for():
    probe = Probe(torch.zeros(3, 1), 7, 9)
    assert with_reread(probe, make_prompt(500, 5), embed, 0) is probe


@pytest.mark.parametrize("consolidation", ["none", "attention_flow", "least_squares"])
def test_only_a_refit_reads_again(consolidation):
    method = make_method("snapkv", consolidation=consolidation)
    probe = make_probe(method, make_prompt(900, 64))
    assert (probe.ranking_tokens is not None) is (consolidation == "least_squares")


def test_what_is_read_again_ranks_nothing_and_refits_more(monkeypatch):
    """The same entries stay with and without it, and their values bring back the output of what was read."""
    span, again = 512, 192
    method = make_method("metasoft", monkeypatch, consolidation="least_squares")
    shape = method.shape
    heads, groups, d = shape.num_heads, shape.num_kv_heads, shape.head_dim
    generator = torch.Generator().manual_seed(3)
    pool = LayerPool(*(torch.randn(span, groups, d, generator=generator) for _ in range(2)), d**-0.5, 1.0, 1.0)
    direction = torch.randn(1, heads, d, generator=generator)  # what is read again asks for other entries
    q = torch.randn(32 + 2 * again, heads, d, generator=generator)
    q[32:] = q[32:] * 0.3 + direction
    k = v = torch.zeros(len(q), groups, d)
    q, later = q[: 32 + again], q[32 + again :]
    slots = torch.arange(span)

    def compress(tokens):
        probe = Probe(torch.empty(tokens, shape.hidden_size), span, span, 32 if tokens > 32 else None)
        job = Job(Plan(0, span, 128, 4), probe, slots, slots, slots[:128])
        return compress_layer(job, q[:tokens], k[:tokens], v[:tokens], pool, method, 1.0, layer=1)[1:3]

    def output(keys, values):
        empty = torch.full((len(later), groups, d), -1e4)
        return attend(later, keys, values, torch.arange(len(keys)), empty, empty * 0, d**-0.5)[0]

    routes, merged = compress(32)
    same_routes, refitted = compress(32 + again)
    assert torch.equal(routes.kept, same_routes.kept)
    before = output(pool.key, pool.value)
    errors = [(output(kv.key, kv.value) - before).norm().item() for kv in (merged, refitted)]
    assert errors[1] < 0.8 * errors[0], errors
