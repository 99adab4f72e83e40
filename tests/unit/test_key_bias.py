"""Biases carried by keys: what repeats, who stands for whom, and attention that is as it was."""

import math

import pytest
import torch
from metasoft_kernels.bias.naive import LARGEST_BIAS, UNMATCHED_SHARE, key_bias, log_biases
from metasoft_kernels.move import add_to_keys

from sglang_metasoft.consolidations.key_directions import AHEAD_TOKENS, FIRST_TOKENS, fit_key_directions
from sglang_metasoft.consolidations.repeats import ID_BITS, ORDERS, Repeats, demote_repeats, find_repeats
from sglang_metasoft.rope import rotate, rotate_all
from sglang_metasoft.types import Rope
from tests.unit.methods import CPU, SHAPE, TinyModel, layer_with, rope_table

S, G, B, D, SINKS = 60, 3, 20, 16, 2


def same_sets(numbers: torch.Tensor, keys: list) -> bool:
    return all((numbers[i] == numbers[j]).item() is (keys[i] == keys[j]) for i in range(S) for j in range(S))


def test_repeats_are_equal_in_their_last_tokens():
    ids = torch.randint(0, 3, (S,))
    ids[:6] = torch.tensor([0, 0, 2, 0, 0, 2])
    words = ids.tolist()
    found = find_repeats(ids)
    assert found.shape == (len(ORDERS), S) and found.min() >= 0 and found.max() < S
    for row, order in zip(found, ORDERS, strict=True):
        keys = [tuple(words[i - order + 1 : i + 1]) if i >= order - 1 else ("start", i) for i in range(S)]
        assert same_sets(row, keys)


@pytest.mark.parametrize("largest", [2**ID_BITS - 1])
def test_no_two_triples_are_taken_for_one(largest):
    ids = torch.tensor([largest, largest, largest, 0, largest, 0, 0, largest, largest, largest, 1, largest])
    assert len(set(find_repeats(ids)[0].tolist())) == len(ids) - 1  # the triple of the largest comes twice


@pytest.mark.parametrize("low", [0.0, -2.0])
def test_one_of_each_comes_first(low):
    importance, repeats = torch.rand(G, S) + low, torch.randint(0, 25, (S,))
    ours = demote_repeats(importance, repeats)
    if low < 0:
        importance = importance - importance.amin(1, keepdim=True)
    for g in range(G):
        for number in range(25):
            members = [i for i in range(S) if repeats[i] == number]
            best = sorted(members, key=lambda i: -importance[g, i].item())
            for rank, i in enumerate(best):
                expected = importance[g, i] / (1 + rank)
                if rank == 0:
                    expected = (importance[g, i] * importance[g, members].sum()).sqrt()
                torch.testing.assert_close(ours[g, i], expected)


def test_without_repeats_the_ranking_stays():
    importance = torch.rand(G, S)
    ours = demote_repeats(importance, torch.arange(S))
    torch.testing.assert_close(ours, importance)


@pytest.mark.parametrize("kinds", [1, 4, 10**6])
@pytest.mark.parametrize("low", [0.0, -2.0])
def test_what_is_said_once_needs_no_sort(kinds, low, monkeypatch):
    """The same bits, from a sort of the repeated entries alone."""
    ids, importance = torch.randint(kinds, (500,)), torch.rand(G, 500) ** 30 + low
    repeats = Repeats(ids)
    expected = demote_repeats(importance, find_repeats(ids)[0])
    triples = [tuple(ids[i - 2 : i + 1].tolist()) if i > 1 else i for i in range(500)]
    assert repeats.repeated.tolist() == [i for i, triple in enumerate(triples) if triples.count(triple) > 1]
    assert torch.equal(repeats.demote(importance), expected)
    monkeypatch.setattr(Repeats, "repeated", None)  # as where asking would wait for a device
    assert torch.equal(repeats.demote(importance), expected)


def test_biases_are_the_dropped_attention_by_kind():
    mass, kept = torch.rand(G, S), torch.stack([torch.randperm(S)[:B].sort().values for _ in range(G)])
    kept[:, :SINKS] = torch.arange(SINKS)
    repeats = torch.stack([torch.randint(0, 30, (S,)), torch.randint(0, 12, (S,))])
    ours = log_biases(mass, kept, repeats, SINKS)
    for g in range(G):
        stay = [i for i in dict.fromkeys(kept[g].tolist()) if i >= SINKS]
        carried, lost = {i: mass[g, i].item() for i in stay}, 0.0
        for i in set(range(SINKS, S)) - set(stay):
            for row in repeats:
                heirs = [j for j in stay if row[j] == row[i]]
                if heirs:
                    break
            total = sum(mass[g, j].item() for j in heirs)
            for j in heirs:
                carried[j] += mass[g, i].item() * mass[g, j].item() / total
            lost += 0 if heirs else mass[g, i].item()
        factor = 1 + UNMATCHED_SHARE * lost / sum(carried.values())
        for slot, i in enumerate(kept[g].tolist()):
            expected = 0.0 if i < SINKS else min(math.log(carried[i] * factor / mass[g, i].item()), LARGEST_BIAS)
            assert ours[g, slot].item() == pytest.approx(expected, abs=1e-4)


def test_attention_to_repeats_is_as_it_was():
    """Every entry occurs three times; one of each stays; queries share a direction: the output does not change."""
    direction = torch.nn.functional.normalize(torch.randn(G, D), dim=-1)
    unlike = torch.randn(200, G, D)
    queries = unlike - (unlike * direction).sum(-1, keepdim=True) * direction + 5 * direction
    keys, values = (torch.randn(S // 3, G, D).repeat(3, 1, 1) for _ in range(2))
    kept = torch.arange(S // 3).expand(G, -1)
    repeats = (torch.arange(S) % (S // 3)).expand(2, -1)
    scale = D**-0.5

    def attend(keys, values):
        return torch.einsum("gts,sgd->tgd", (torch.einsum("tgd,sgd->gts", queries, keys) * scale).softmax(-1), values)

    rest_keys, rest_values = torch.randn(7, G, D), torch.randn(7, G, D)  # what is not compressed keeps its share
    full = attend(torch.cat([keys, rest_keys]), torch.cat([values, rest_values]))
    logits = torch.einsum("tgd,sgd->gts", queries, torch.cat([keys, rest_keys])) * scale
    mass = logits.softmax(-1).mean(1)[:, :S]
    moves = key_bias(mass, kept, repeats, direction / 5, scale, 0)
    short_keys, short_values = keys[: S // 3], values[: S // 3]
    biased = attend(torch.cat([short_keys + moves, rest_keys]), torch.cat([short_values, rest_values]))
    plain = attend(torch.cat([short_keys, rest_keys]), torch.cat([short_values, rest_values]))
    torch.testing.assert_close(biased, full, atol=1e-4, rtol=1e-4)
    assert (plain - full).abs().max() > 0.1


@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("factor", [1.0, 1.3])
def test_a_direction_serves_queries_at_any_distance_that_was_asked_for(is_neox, factor):
    """Queries: a common part, as the model has it before RoPE, and a part of their own."""
    angles = torch.outer(torch.arange(8192).float(), 1e6 ** -(torch.arange(0, D, 2) / D))
    table = torch.cat([angles.cos(), angles.sin()], dim=1)
    rope = Rope(table * factor, is_neox)
    common = torch.randn(1, SHAPE.num_kv_heads, 1, D).expand(1, -1, 2, -1).flatten(1, 2)
    model = TinyModel(CPU)
    model.layers = lambda: [layer_with(rope)] * SHAPE.num_layers
    noise = torch.randn(4096, SHAPE.num_heads, D) / 4

    def queries(ids, first=0):
        count = len(ids)
        return [rotate(3 * common + noise[:count], rope, first) for _ in range(SHAPE.num_layers)]

    model.queries = queries
    found = fit_key_directions(model, SHAPE, CPU)
    assert found.unturned.shape == (SHAPE.num_layers, SHAPE.num_kv_heads, D)
    here = found.at(2000)
    assert here.shape == found.unturned.shape
    (later, _) = queries(range(300), 2100)
    raised = (later.view(300, SHAPE.num_kv_heads, -1, D) * here[1].unsqueeze(1)).sum(-1)
    assert (raised - 1).square().mean().sqrt() < 0.25
    assert torch.equal(found.at(10**9), found.at(len(table) - 1))


def test_the_fit_is_the_ridge_regression():
    found = fit_key_directions(TinyModel(CPU), SHAPE, CPU)
    rope = TinyModel(CPU).layers()[0].rope
    ids = range(1024)
    for layer, q in enumerate(TinyModel(CPU).queries(torch.empty(len(ids)))):
        center = rotate(q, rope, 0, backwards=True)[FIRST_TOKENS:]
        for g in range(SHAPE.num_kv_heads):
            rows = torch.cat([rotate_all(center, rope, n)[:, 2 * g : 2 * g + 2].reshape(-1, D) for n in AHEAD_TOKENS])
            gram = rows.T @ rows
            ridge = 0.01 * gram.diagonal().mean() * torch.eye(D)
            expected = torch.linalg.solve(gram + ridge, rows.sum(0))
            torch.testing.assert_close(found.unturned[layer, g], expected, atol=1e-4, rtol=1e-3)


def test_a_server_without_a_tokenizer_fits_to_random_tokens():
    model = TinyModel(CPU)
    asked = []

    def encode(text):
        raise ValueError("no tokenizer")

    model.encode, take = encode, model.queries
    model.queries = lambda ids: asked.append(ids) or take(ids)
    assert fit_key_directions(model, SHAPE, CPU).unturned.isfinite().all()
    assert asked[0].numel() == 1024 and 0 <= asked[0].min() and asked[0].max() < SHAPE.vocab_size
    assert asked[0].unique().numel() > 500


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_head_without_queries_has_no_direction(value):
    model = TinyModel(CPU)
    take = model.queries

    def queries(ids):
        found = take(ids)
        found[0][:, :2] = value  # all query heads of KV head 0
        return found

    model.queries = queries
    found = fit_key_directions(model, SHAPE, CPU).unturned
    assert found.isfinite().all() and not found[0, 0].any() and found[0, 1:].any() and found[1].any()


def test_a_model_of_few_positions_reads_as_many_tokens():
    model, asked = TinyModel(CPU), []
    model.layers = lambda: [layer_with(Rope(rope_table(200), True))] * SHAPE.num_layers
    take = model.queries
    model.queries = lambda ids: asked.append(ids.numel()) or take(ids)
    found = fit_key_directions(model, SHAPE, CPU)
    assert asked == [200] and found.unturned.isfinite().all() and found.at(5000).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_keys_move_in_the_pools_own_numbers(dtype):
    scale = 0.5 if dtype == torch.float8_e4m3fn else 1.0
    pool = torch.randn(30, G, D).to(dtype)
    before, slots, moves = pool.float().clone(), torch.tensor([7, 2, 29]), torch.randn(3, G, D)
    moves[1] = 0
    add_to_keys(pool, slots, moves, scale)
    expected = before.clone()
    expected[slots] = ((before[slots] * scale + moves) / scale).to(dtype).float()
    assert torch.equal(pool.float(), expected) and torch.equal(pool[2].float(), before[2])
