"""The torch implementation of each stage, one by one: masses, selection, routing, consolidation."""

import pytest
import torch
from metasoft_kernels.merge import attention_flow, gather
from metasoft_kernels.probe import attend
from metasoft_kernels.route import route
from metasoft_kernels.score import importance
from metasoft_kernels.select import split_top

SHAPES = [(1, 1, 1, 64), (63, 3, 3, 64), (64, 2, 4, 80), (65, 8, 2, 128), (1000, 3, 3, 64)]


def make_pool(entries, groups, d, dtype=torch.float32):
    """A pool full of NaN, but for the slots in use, which are scattered."""
    slots = torch.randperm(2 * entries + 3)[:entries]
    pool = [torch.full((2 * entries + 3, groups, d), float("nan"), dtype=dtype) for _ in range(2)]
    for buffer in pool:
        buffer[slots] = torch.randn(entries, groups, d).to(dtype)
    return *pool, slots


@pytest.mark.parametrize(("entries", "groups", "r", "d"), SHAPES)
def test_probe_attention_is_causal_softmax_attention(entries, groups, r, d):
    k, v, slots = make_pool(entries, groups, d)
    t, heads = 5, groups * r
    q, k_new, v_new = torch.randn(t, heads, d), torch.randn(t, groups, d), torch.randn(t, groups, d)
    out, lse = attend(q, k, v, slots, k_new, v_new, d**-0.5)
    for token in range(t):
        for head in range(heads):
            keys = torch.cat([k[slots, head // r], k_new[: token + 1, head // r]])
            values = torch.cat([v[slots, head // r], v_new[: token + 1, head // r]])
            logits = keys @ q[token, head] * d**-0.5
            torch.testing.assert_close(lse[token, head], logits.logsumexp(0))
            torch.testing.assert_close(out[token, head], logits.softmax(0) @ values, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("window", [2, 5, 64, 68, 69, 300])
def test_in_a_window_a_token_sees_itself_and_so_many_less_one_before_it(window):
    """Of 64 entries and 300 probe tokens, more than a block of them."""
    k, v, slots = make_pool(64, 2, 64)
    q, k_new, v_new = torch.randn(300, 4, 64), torch.randn(300, 2, 64), torch.randn(300, 2, 64)
    out, lse = attend(q, k, v, slots, k_new, v_new, 0.125, window=window)
    for token in (0, 1, 4, 5, 63, 257, 299):
        for head in range(4):
            keys, values = (
                torch.cat([old[slots, head // 2], new[: token + 1, head // 2]])[-window:]
                for old, new in ((k, k_new), (v, v_new))
            )
            logits = keys @ q[token, head] * 0.125
            torch.testing.assert_close(lse[token, head], logits.logsumexp(0), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(out[token, head], logits.softmax(0) @ values, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("entries", "groups", "r", "d"), SHAPES)
def test_importance_is_the_mean_probability_and_all_mass_is_accounted_for(entries, groups, r, d):
    k, v, slots = make_pool(entries, groups, d)
    q = torch.randn(4, groups * r, d)
    nothing = torch.empty(4, groups, d)
    nothing.fill_(-1e4 / d)
    _, lse = attend(q, k, v, slots, torch.zeros(4, groups, d), torch.zeros(4, groups, d), d**-0.5)
    mass = importance(q, k, slots, lse, d**-0.5)
    assert mass.shape == (groups, entries) and mass.dtype == torch.float32
    own = torch.stack([(token + 1) * (-lse[token]).exp() for token in range(4)])  # zero keys: logit 0
    expected_rest = own.view(4, groups, r).mean(dim=(0, 2))
    torch.testing.assert_close(mass.sum(1) + expected_rest, torch.ones(groups))


def test_quantized_entries_are_scaled_on_reading():
    k, v, slots = make_pool(50, 2, 64)
    q, new = torch.randn(3, 4, 64), torch.randn(3, 2, 64)
    plain = attend(q, k, v, slots, new, new, 0.125)
    scaled = attend(q, k / 2, v / 4, slots, new, new, 0.125, 2.0, 4.0)
    torch.testing.assert_close(plain, scaled)
    torch.testing.assert_close(
        importance(q, k, slots, plain[1], 0.125), importance(q, k / 2, slots, plain[1], 0.125, 2.0)
    )


def test_selection_keeps_sinks_and_the_best_in_ascending_order():
    mass = torch.tensor([[0.0, 0.1, 0.9, 0.2, 0.8, 0.3], [0.5, 0.5, 0.5, 0.5, 0.5, 0.5]])
    kept, dropped = split_top(mass, 3, 1)
    assert kept.tolist() == [[0, 2, 4], [0, 1, 2]]  # of equal entries the earlier ones stay
    assert dropped.tolist() == [[1, 3, 5], [3, 4, 5]]


def test_selection_survives_nan_and_drops_it_first():
    mass = torch.tensor([[0.1, float("nan"), 0.3, 0.2]])
    kept, dropped = split_top(mass, 3, 0)
    assert kept.tolist() == [[0, 2, 3]] and dropped.tolist() == [[1]]


@pytest.mark.parametrize("kept_slots", [1, 17, 64])
def test_selection_is_a_partition(kept_slots):
    kept, dropped = split_top(torch.rand(3, 64), kept_slots, 1)
    both = torch.cat([kept, dropped], 1).sort(1).values
    assert torch.equal(both, torch.arange(64).expand(3, 64))


def test_routing_picks_the_closest_kept_keys(monkeypatch):
    monkeypatch.setattr("metasoft_kernels.route.naive.BLOCK_ROWS", 7)  # several blocks
    keys = torch.randn(40, 2, 16)
    kept, dropped = split_top(torch.rand(2, 40), 10, 0)
    targets, weights = route(keys, kept, dropped, 3, 0.25)
    for head in range(2):
        affinity = keys[dropped[head], head] @ keys[kept[head], head].T * 0.25
        best = affinity.topk(3)
        assert torch.equal(targets[head], best.indices)
        torch.testing.assert_close(weights[head], best.values.softmax(-1))
    assert route(keys, kept[:, :2], dropped, 4, 0.25)[0].shape[-1] == 2  # no more targets than kept entries


def test_routing_in_a_band_picks_among_the_nearest_kept_entries():
    keys = torch.randn(60, 2, 16)
    kept, dropped = split_top(torch.rand(2, 60), 20, 0)
    for band in (1, 4, 5, 20, 99):
        targets, weights = route(keys, kept, dropped, 3, 0.25, band=band)
        assert targets.shape[-1] == min(3, band)
        for head in range(2):
            for row, entry in enumerate(dropped[head].tolist()):
                before = int((kept[head] < entry).sum())
                first = min(max(before - band // 2, 0), max(20 - band, 0))
                near = kept[head, first : first + band]
                assert len(near) == min(band, 20)
                best = (keys[near, head] @ keys[entry, head] * 0.25).topk(min(3, band))
                assert torch.equal(targets[head, row], best.indices + first)
                torch.testing.assert_close(weights[head, row], best.values.softmax(-1))


def test_consolidation_against_a_dense_matrix():
    entries, groups, d, m = 50, 2, 16, 4
    keys, values, mass = torch.randn(entries, groups, d), torch.randn(entries, groups, d), torch.rand(groups, entries)
    kept, dropped = split_top(mass, 12, 2)
    targets, weights = route(keys, kept, dropped, m, 0.25)
    gate_scale = torch.tensor([[0.5], [1.0]])
    merged = attention_flow(values, mass, kept, dropped, targets, weights, gate_scale)
    for head in range(groups):
        routing = torch.zeros(entries - 12, 12)
        for row in range(entries - 12):
            for column, weight in zip(targets[head, row], weights[head, row], strict=True):
                routing[row, column] += weight
        flow = (routing / (routing.sum(0) + 1e-6)).T @ values[dropped[head], head]
        moved = routing.T @ mass[head, dropped[head]]
        gate = gate_scale[head] * moved / (mass[head, kept[head]] + moved)
        before = values[kept[head], head]
        torch.testing.assert_close(merged[:, head], before + gate[:, None] * (flow - before))


def test_consolidation_without_mass_or_without_flow_changes_nothing():
    values = torch.randn(6, 1, 4)
    kept, dropped = torch.tensor([[0, 2]]), torch.tensor([[1, 3, 4, 5]])
    targets, weights = torch.zeros(1, 4, 1, dtype=torch.int64), torch.ones(1, 4, 1)
    merged = attention_flow(values, torch.zeros(1, 6), kept, dropped, targets, weights)
    assert torch.equal(merged, gather(values, kept))
    merged = attention_flow(values, torch.ones(1, 6), kept, dropped, targets, weights)
    assert torch.equal(merged[1], values[2])  # nothing flows into the second
    assert not torch.equal(merged[0], values[0])


def test_gather_takes_each_heads_own_entries():
    entries = torch.randn(9, 2, 4)
    indices = torch.tensor([[0, 3, 8], [1, 2, 5]])
    picked = gather(entries, indices)
    for slot in range(3):
        for head in range(2):
            assert torch.equal(picked[slot, head], entries[indices[head, slot], head])
