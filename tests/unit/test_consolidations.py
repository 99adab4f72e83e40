"""Each consolidation against its formula written anew, one head and one entry at a time."""

import pytest
import torch
from metasoft_kernels.merge import gather
from metasoft_kernels.merge.least_squares import RIDGE, least_squares
from metasoft_kernels.merge.nearest import nearest
from metasoft_kernels.merge.tome import tome
from metasoft_kernels.merge.zeromerge import zeromerge
from metasoft_kernels.probe import attend
from metasoft_kernels.select import split_top

from sglang_metasoft.consolidations import load_consolidation

S, B, G, R, D = 60, 20, 2, 3, 16


@pytest.fixture
def layer():
    keys, values, mass = torch.randn(S, G, D), torch.randn(S, G, D), torch.rand(G, S)
    return keys, values, mass, *split_top(mass, B, 2)


def cosine(a, b):
    return (a @ b / (a.norm() * b.norm())).item()


def test_tome_is_a_weighted_mean_into_the_most_similar_direction(layer):
    keys, values, mass, kept, dropped = layer
    merged = tome(keys, values, kept, dropped)
    for g in range(G):
        total, load = values[kept[g], g].clone(), torch.ones(B)
        for i in dropped[g].tolist():
            alike = [cosine(keys[i, g], keys[j, g]) for j in kept[g].tolist()]
            slot = max(range(B), key=alike.__getitem__)
            size, target_size = values[i, g].norm(), values[kept[g, slot], g].norm()
            weight = max(alike[slot], 0.0) * size / (size + target_size)
            total[slot] += weight * values[i, g]
            load[slot] += weight
        torch.testing.assert_close(merged[:, g], total / load[:, None], atol=1e-4, rtol=1e-4)


def test_tome_leaves_a_value_that_nothing_resembles():
    keys = torch.tensor([[1.0, 0], [0, 1], [-1, 0.1], [0.9, 0.1]]).unsqueeze(1)
    values = torch.randn(4, 1, 2)
    merged = tome(keys, values, torch.tensor([[0, 1]]), torch.tensor([[2, 3]]))
    assert not torch.equal(merged[0, 0], values[0, 0])
    weight = cosine(keys[2, 0], keys[1, 0]) * values[2, 0].norm() / (values[2, 0].norm() + values[1, 0].norm())
    torch.testing.assert_close(merged[1, 0], (values[1, 0] + weight * values[2, 0]) / (1 + weight))
    keys[2, 0, 1] = -0.1
    assert torch.equal(tome(keys, values, torch.tensor([[0, 1]]), torch.tensor([[2, 3]]))[1, 0], values[1, 0])


def test_zeromerge_means_by_count_into_the_least_of_the_kept(layer):
    keys, values, mass, kept, dropped = layer
    merged = zeromerge(keys, values, mass, kept, dropped)
    for g in range(G):
        residual = sorted(range(B), key=lambda slot: mass[g, kept[g, slot]].item())[: B // 10]
        members = {slot: [kept[g, slot].item()] for slot in range(B)}
        for i in dropped[g].tolist():
            best = max(residual, key=lambda slot: (keys[i, g] @ keys[kept[g, slot], g]).item())
            members[best].append(i)
        expected = torch.stack([values[members[slot], g].mean(0) for slot in range(B)])
        torch.testing.assert_close(merged[:, g], expected)
        exact = [slot for slot in range(B) if slot not in residual]
        assert torch.equal(merged[exact, g], values[kept[g, exact], g])


def test_nearest_in_several_blocks(monkeypatch):
    monkeypatch.setattr("metasoft_kernels.merge.nearest.BLOCK_ROWS", 7)
    rows, columns = torch.randn(G, 40, D), torch.randn(G, 9, D)
    best, index = nearest(rows, columns)
    expected = torch.einsum("gnd,gbd->gnb", rows, columns)
    torch.testing.assert_close(best, expected.amax(-1))
    assert torch.equal(index, expected.argmax(-1))


def probe_layer(tokens: int, rerun: int = 0):
    """Keys, values, q, lse and what the probe saw; ``rerun`` of the tokens are the span's own last ones."""
    keys, values, q = torch.randn(S, G, D), torch.randn(S, G, D), torch.randn(tokens, G * R, D)
    seen = S - rerun
    own = [torch.cat([x[seen:], torch.randn(tokens - rerun, G, D)]) for x in (keys, values)]
    _, lse = attend(q, keys, values, torch.arange(seen), *own, D**-0.5)
    return keys, values, q, lse, seen


@pytest.mark.parametrize(("tokens", "rerun", "sinks"), [(5, 0, 2), (8, 8, 2), (30, 10, 4), (150, 0, 0)])
def test_least_squares_is_the_ridge_regression(tokens, rerun, sinks):
    keys, values, q, lse, seen = probe_layer(tokens, rerun)
    kept, _ = split_top(torch.rand(G, S), B, sinks)
    merged = least_squares(keys, values, kept, q, lse, D**-0.5, seen, sinks)
    for g in range(G):
        attention = torch.zeros(tokens * R, S, dtype=torch.float64)
        for row, (token, r) in enumerate((token, r) for token in range(tokens) for r in range(R)):
            logits = keys[:, g].double() @ q[token, g * R + r].double() * D**-0.5
            visible = torch.arange(S) < seen + token + 1
            attention[row] = torch.where(visible, (logits - lse[token, g * R + r]).exp(), 0)
        a = attention[:, kept[g]]
        a = a * (attention.sum(1) / a.sum(1)).unsqueeze(1)
        old = values[kept[g], g].double()
        missing = attention @ values[:, g].double() - a @ old
        a = a[:, sinks:]
        ridge = RIDGE * (a**2).sum(1).mean()
        change = torch.linalg.solve(a.T @ a + ridge * torch.eye(B - sinks), a.T @ missing)
        torch.testing.assert_close(merged[sinks:, g].double(), old[sinks:] + change, atol=2e-3, rtol=2e-3)
        assert torch.equal(merged[:sinks, g], values[:sinks, g])
        assert (missing - a @ change).norm() < missing.norm()


def test_least_squares_brings_the_output_of_queries_like_the_probes_back():
    """The attention output after the compression, recomputed over what is left, comes nearer to that of before."""
    t = 40
    keys, values = torch.randn(S, G, D), torch.randn(S, G, D)
    nothing = torch.full((t, G, D), -1e4), torch.zeros(t, G, D)
    q = (torch.randn(1, G * R, D) + 0.3 * torch.randn(t, G * R, D)).abs()  # their own keys get no attention
    probe, later = q[: t // 2], q[t // 2 :]
    before, lse = attend(q, keys, values, torch.arange(S), *nothing, D**-0.5)
    kept, _ = split_top(torch.rand(G, S), B, 2)
    refit = least_squares(keys, values, kept, probe, lse[: t // 2], D**-0.5, S, 2)
    error = {}
    for name, new in (("plain", gather(values, kept)), ("refit", refit)):
        after, _ = attend(later, gather(keys, kept), new, torch.arange(B), *(x[t // 2 :] for x in nothing), D**-0.5)
        error[name] = ((after - before[t // 2 :]).norm() / before[t // 2 :].norm()).item()
    assert error["refit"] < 0.8 * error["plain"], error


def test_least_squares_without_any_attention_changes_nothing():
    keys, values, q, lse, seen = probe_layer(5)
    kept, _ = split_top(torch.rand(G, S), B, 2)
    merged = least_squares(keys, values, kept, q, torch.full_like(lse, 1e4), D**-0.5, seen, 2)
    assert torch.equal(merged, gather(values, kept))


def test_an_unknown_consolidation_lists_the_known_ones():
    with pytest.raises(ValueError, match="'magic' is not allowed; allowed: one of: none, attention_flow"):
        load_consolidation("magic")
