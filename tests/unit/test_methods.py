"""Every method with every consolidation on plain tensors, and each method against its formula written anew."""

import math
import statistics
from statistics import NormalDist

import pytest
import torch
from metasoft_kernels.probe import attend
from metasoft_kernels.score import probability_blocks

from sglang_metasoft.config import CONSOLIDATIONS, METHODS, MetaSoftConfig
from sglang_metasoft.consolidations import load_consolidation
from sglang_metasoft.consolidations.calibration import CALIBRATION_TOKENS
from sglang_metasoft.methods import load_method
from sglang_metasoft.methods.base import Method
from sglang_metasoft.methods.expected_attention import FUTURE_TOKENS, mean_rotation
from sglang_metasoft.pipeline.layer import compress_layer
from sglang_metasoft.pipeline.probe import make_probe
from sglang_metasoft.rope import rotate
from sglang_metasoft.types import Job, LayerView, Plan, Probe, Rope
from tests.unit.methods import (
    CPU,
    KEPT,
    SHAPE,
    SPAN,
    TAIL,
    TinyModel,
    make_job,
    make_method,
    make_pool,
    make_prompt,
    make_tensors,
    make_view,
    rope_table,
)

EVERY = [(method, consolidation) for method in METHODS for consolidation in CONSOLIDATIONS]
GROUPS, RATIO, D = SHAPE.num_kv_heads, SHAPE.num_heads // SHAPE.num_kv_heads, SHAPE.head_dim


def compress(method, consolidation, kept=KEPT, pool=None, empty=False, spoil=None):
    method = make_method(method, consolidation=consolidation)
    probe = make_probe(method, make_prompt())
    if empty:
        probe = probe._replace(embeds=probe.embeds[:0])
    q, k, v = make_tensors(probe.embeds.shape[0])
    if spoil is not None:
        q[0, 0] = spoil
    job = make_job(probe, kept)
    return compress_layer(job, q, k, v, pool or make_pool(), method, method.gate_scale(1, 0, 3), 1)


@pytest.mark.parametrize(("method", "consolidation"), EVERY)
def test_every_pair_keeps_sinks_and_its_own_keys(method, consolidation):
    pool = make_pool()
    out, routes, merged, is_finite = compress(method, consolidation)
    assert out.isfinite().all() and is_finite.item() is True
    assert torch.equal(routes.kept[:, :4], torch.arange(4).expand(GROUPS, 4))
    both = torch.cat([routes.kept, routes.dropped], 1).sort(1).values
    assert torch.equal(both, torch.arange(SPAN).expand(GROUPS, SPAN))
    for head in range(GROUPS):
        moved, changed = (
            (entries[:, head] != raw[routes.kept[head], head]).any(1)
            for entries, raw in zip(merged, (pool.key, pool.value), strict=True)
        )
        assert moved.any().item() is (consolidation == "key_bias") and not moved[:4].any()
        assert changed.any().item() is (consolidation not in ("none", "key_bias"))
    assert merged.value.abs().max() < 3 * pool.value.abs().max()


@pytest.mark.parametrize(("method", "consolidation"), EVERY)
def test_at_ratio_1_every_pair_is_the_identity(method, consolidation):
    pool = make_pool()
    _, routes, merged, _ = compress(method, consolidation, kept=SPAN)
    assert torch.equal(merged.key, pool.key[:SPAN]) and torch.equal(merged.value, pool.value[:SPAN])
    assert torch.equal(routes.kept, torch.arange(SPAN).expand(GROUPS, SPAN))


@pytest.mark.parametrize(("method", "consolidation"), EVERY)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_pair_writes_what_is_not_finite(method, consolidation, value):
    """A spoilt query, and a spoilt value that is kept or flows somewhere."""
    compress_spoilt = compress(method, consolidation, spoil=value)
    assert compress_spoilt[2].value.isfinite().all() and compress_spoilt[2].key.isfinite().all()
    pool = make_pool()
    pool.value[50, 1] = value
    _, routes, merged, is_finite = compress(method, consolidation, pool=pool)
    written = merged.value[:, 1][routes.kept[1] != 50]  # a kept entry that was so before stays so
    assert written.isfinite().all()
    if 50 in routes.kept[1]:
        assert is_finite.item() is False


@pytest.mark.parametrize("name", [name for name in METHODS if not load_method(name).needs_probe])
@pytest.mark.parametrize("consolidation", [name for name in CONSOLIDATIONS if not load_consolidation(name).needs_probe])
def test_a_method_without_a_probe_chooses_the_same_without_one(name, consolidation):
    _, with_probe, merged, _ = compress(name, consolidation)
    out, without, merged_without, is_finite = compress(name, consolidation, empty=True)
    assert out.shape == (0, SHAPE.num_heads, D) and is_finite.item() is True
    assert torch.equal(with_probe.kept, without.kept) and torch.equal(merged.value, merged_without.value)


def test_probabilities_are_causal_softmax_over_everything_seen(monkeypatch):
    """The last tokens once more: against one dense causal softmax, in which the entries of the rerun are theirs."""
    monkeypatch.setattr("metasoft_kernels.probe.naive.BLOCK_TOKENS", 32)
    rerun = 90
    pool, (q, _, _) = make_pool(), make_tensors(rerun)
    seen = SPAN + TAIL - rerun
    k_new, v_new = pool.key[seen:], pool.value[seen:]
    _, lse = attend(q, pool.key, pool.value, torch.arange(seen), k_new, v_new, pool.scale)
    blocks = list(probability_blocks(q, pool.key, torch.arange(SPAN), lse, pool.scale, 1.0, seen))
    ours = torch.cat(blocks, dim=2)
    for head in range(SHAPE.num_heads):
        logits = q[:, head] @ pool.key[:, head // RATIO].T * pool.scale
        mask = torch.arange(SPAN + TAIL) > torch.arange(seen, SPAN + TAIL).unsqueeze(1)
        expected = logits.masked_fill(mask, -math.inf).softmax(-1)[:, :SPAN]
        torch.testing.assert_close(ours[head // RATIO, head % RATIO], expected)


def test_h2o_sums_what_each_token_pays_and_keeps_the_most_recent():
    method = make_method("h2o", window=8)
    view = make_view(40, seen_tokens=SPAN + TAIL - 40)
    scores = method.score_layer(view)
    (probabilities,) = probability_blocks(view.q, view.pool.key, torch.arange(SPAN), view.lse, 0.25, 1.0, SPAN + 24)
    torch.testing.assert_close(scores.mass, probabilities.mean(1).mean(1))
    recent = (KEPT + 8) // 2 - 8
    best = scores.importance.topk(KEPT).indices.sort(1).values
    assert (best[:, -recent:] == torch.arange(SPAN - recent, SPAN)).all()
    heavy = scores.mass[:, : SPAN - recent].topk(KEPT - recent).indices.sort(1).values
    assert torch.equal(best[:, : KEPT - recent], heavy)


def test_h2o_runs_what_is_set_and_no_more():
    prompt = make_prompt()
    for observed, expected in ((10, 10), (100, 100), (5000, SPAN + TAIL)):
        probe = make_method("h2o", observed_tokens=observed).probe(prompt)
        assert probe.embeds.shape[0] == expected
        assert probe.context_slots == probe.first_position == SPAN + TAIL - expected


def test_streaming_llm_keeps_the_last():
    _, routes, _, _ = compress("streaming_llm", "none", empty=True)
    expected = [0, 1, 2, 3, *range(SPAN - KEPT + 4, SPAN)]
    assert routes.kept.tolist() == [expected] * GROUPS


def test_chunkkv_keeps_whole_chunks_alike_in_all_heads():
    method = make_method("chunkkv")
    view = make_view(16)
    scores = method.score_layer(view)
    window = scores.mass.sum(0)
    chunks = [list(range(start, min(start + 20, SPAN))) for start in range(0, SPAN, 20)]
    chunks.sort(key=lambda chunk: -sum(window[i].item() for i in chunk) / len(chunk))
    expected = [index for chunk in chunks for index in chunk]
    for head in range(GROUPS):
        assert scores.importance[head].argsort(descending=True).tolist() == expected
    torch.testing.assert_close(scores.mass, make_method("metasoft").score_layer(view).importance)


def test_kvcompose_takes_the_peak_over_tokens_and_adds_the_heads_mean():
    method, view = make_method("kvcompose"), make_view(100)
    expected = torch.zeros(GROUPS, SPAN)
    for group in range(GROUPS):
        for r in range(RATIO):
            logits = view.q[:, group * RATIO + r] @ view.pool.key[:SPAN, group].T * 0.25
            expected[group] += (logits - 6.0).exp().max(0).values / RATIO
    torch.testing.assert_close(method.score_layer(view).importance, expected + expected.mean(0))
    probe = method.probe(make_prompt())
    assert probe.embeds.shape[0] == SPAN + TAIL and probe.context_slots == probe.first_position == SPAN + TAIL


def test_q_filters_project_on_the_queries_main_direction():
    method, view = make_method("q_filters"), make_view(0)
    queries = TinyModel(CPU).queries(torch.arange(CALIBRATION_TOKENS))[1]
    filters = []
    for head in range(SHAPE.num_heads):
        values, vectors = torch.linalg.eigh((queries[:, head].T @ queries[:, head]).double())
        main = vectors[:, -1].float()
        filters.append(main * (queries[:, head] @ main).sign().mean().sign())
    mean = torch.stack(filters).view(GROUPS, RATIO, D).mean(1)
    expected = torch.einsum("sgd,gd->gs", view.pool.key[:SPAN], mean)
    torch.testing.assert_close(method.score_layer(view).importance, expected, atol=1e-4, rtol=1e-4)


def test_nestedkv_ranks_a_key_that_stands_out_at_every_scale_first():
    method, view = make_method("nestedkv"), make_view(0)
    keys = torch.ones_like(view.pool.key) + 0.1 * view.pool.key
    keys[123, 1] = -1.0
    importance = method.score_layer(view._replace(pool=view.pool._replace(key=keys))).importance
    assert importance[1].argmax() == 123
    assert importance.min() >= 0 and importance.max() <= 1


def test_nestedkv_is_the_formula():
    method, view = make_method("nestedkv"), make_view(0)
    importance = method.score_layer(view).importance
    for group in range(GROUPS):
        keys = view.pool.key[:SPAN, group]
        unit = keys / keys.norm(dim=1, keepdim=True)
        scales = []
        for members in (
            lambda i: range(SPAN),
            lambda i: range(i // 128 * 128, min(i // 128 * 128 + 128, SPAN)),
            lambda i: range(max(0, i - 63), i + 1),
        ):
            means = torch.stack([unit[list(members(i))].mean(0) for i in range(SPAN)])
            anomaly = -torch.cosine_similarity(unit, means, dim=1)
            scales.append((anomaly - anomaly.min()) / (anomaly.max() - anomaly.min()))
        gaps = [scale.sort().values[-20:].mean() - scale.sort().values[:20].mean() for scale in scales]
        weights = [p * math.exp(3 * gap) for p, gap in zip((0.4, 0.4, 0.2), gaps, strict=True)]
        mixed = sum(w * scale for w, scale in zip(weights, scales, strict=True)) / sum(weights)
        spread = torch.stack(scales).std(0, correction=0)
        spread = (spread - spread.min()) / (spread.max() - spread.min())
        gate = 1 / (1 + (-10 * (spread - spread.mean() - 0.6)).exp())
        expected = (1 - gate) * mixed + gate * torch.stack(scales).max(0).values
        torch.testing.assert_close(importance[group], expected, atol=1e-5, rtol=1e-4)


def test_nestedkv_is_blind_to_the_length_of_keys():
    method, view = make_method("nestedkv"), make_view(0)
    longer = view._replace(pool=view.pool._replace(key=view.pool.key * 3))
    torch.testing.assert_close(method.score_layer(view).importance, method.score_layer(longer).importance)


def test_keydiff_is_minus_the_cosine_with_the_mean_direction():
    method, view = make_method("keydiff"), make_view(0)
    keys = view.pool.key * torch.linspace(0.1, 5, SPAN + TAIL)[:, None, None]  # so that a mean of plain keys differs
    importance = method.score_layer(view._replace(pool=view.pool._replace(key=keys))).importance
    for group in range(GROUPS):
        unit = [key / key.norm() for key in keys[:SPAN, group]]
        anchor = sum(unit) / SPAN
        expected = [-torch.dot(key, anchor) / anchor.norm() for key in unit]
        torch.testing.assert_close(importance[group], torch.stack(expected), atol=1e-5, rtol=1e-4)


def test_snapkv_keydiff_is_the_better_of_two_standings():
    view = make_view(8)
    method = make_method("snapkv_keydiff")
    scores = method.score_layer(view)
    assert torch.equal(scores.mass, Method.score_layer(method, view).importance)
    cosines = -make_method("keydiff").score_layer(view).importance
    for group in range(GROUPS):
        mass = scores.mass[group].tolist()
        seen = [math.log(max(1e-9, statistics.mean(mass[max(0, n - 3) : n + 4]))) for n in range(SPAN)]
        alike = cosines[group].tolist()
        of_seen, of_alike = (NormalDist(statistics.mean(row), statistics.pstdev(row)) for row in (seen, alike))
        expected = [
            1 - min(3 * (1 - of_seen.cdf(by_attention)), of_alike.cdf(by_key))
            for by_attention, by_key in zip(seen, alike, strict=True)
        ]
        torch.testing.assert_close(scores.importance[group], torch.tensor(expected), atol=1e-4, rtol=1e-4)


def random_scores(ids=None, layer=1, first_kv_head=0, groups=GROUPS):
    method, view = make_method("random"), make_view(16)
    prompt = make_prompt()
    prompt = prompt if ids is None else prompt._replace(span_ids=ids)
    view = view._replace(job=make_job(method.probe(prompt)), layer=layer, first_kv_head=first_kv_head)
    pool = view.pool._replace(key=view.pool.key[:, :groups], value=view.pool.value[:, :groups])
    heads = groups * RATIO
    return method.score_layer(view._replace(pool=pool, q=view.q[:, :heads], lse=view.lse[:, :heads]))


def test_random_draws_once_for_a_span_on_whatever_rank_a_head_lies():
    draws = random_scores().importance
    assert torch.equal(random_scores().importance, draws)
    assert torch.equal(random_scores(first_kv_head=1, groups=1).importance, draws[1:2])


@pytest.mark.parametrize("what", ["layer", "head", "order", "token"])
def test_random_draws_anew_for_whatever_differs(what):
    draws, ids = random_scores().importance, make_prompt().span_ids.clone()
    if what == "token":
        ids[7] += 1
    elif what == "order":
        ids[[7, 8]] = ids[[8, 7]]
    others = {"layer": random_scores(layer=2).importance, "head": draws.roll(1, 0)}
    other = others[what] if what in others else random_scores(ids).importance
    assert torch.corrcoef(torch.stack([draws.flatten(), other.flatten()]))[0, 1].abs() < 0.15


def test_random_draws_are_uniform_and_its_mass_is_the_windows_attention():
    ids = torch.arange(SPAN)
    draws = torch.stack([random_scores(ids + number).importance for number in range(20)])
    assert draws.min() >= 0 and draws.max() < 1
    counts = torch.histc(draws, bins=10, min=0, max=1) / draws.numel()
    assert (counts - 0.1).abs().max() < 0.015  # of 12,000 draws
    assert (draws.mean((0, 1)) - 0.5).abs().max() < 0.2  # at every place
    torch.testing.assert_close(random_scores().mass, make_method("metasoft").score_layer(make_view(16)).importance)


@pytest.mark.parametrize("is_neox", [True, False])
def test_rotation_is_rope_and_turns_back(is_neox):
    rope = Rope(rope_table(d=8), is_neox)  # the last 8 of 16 dimensions do not turn
    x = torch.randn(5, 2, D)
    turned = rotate(x, rope, 100)
    for token in range(5):
        cos, sin = rope.cos_sin[100 + token].chunk(2)
        for pair in range(4):
            a, b = (pair, pair + 4) if is_neox else (2 * pair, 2 * pair + 1)
            before = torch.complex(x[token, :, a], x[token, :, b])
            after = before * torch.complex(cos[pair], sin[pair])
            torch.testing.assert_close(torch.complex(turned[token, :, a], turned[token, :, b]), after)
    assert torch.equal(turned[..., 8:], x[..., 8:])
    torch.testing.assert_close(rotate(turned, rope, 100, backwards=True), x)
    matrix = mean_rotation(rope, 30, D)
    expected = torch.stack([rotate(x[:1], rope, 30 + step)[0] for step in range(FUTURE_TOKENS)]).mean(0)
    torch.testing.assert_close(x[0] @ matrix.T, expected, atol=1e-5, rtol=1e-4)
    assert mean_rotation(rope, 10_000, D).isfinite().all()  # past the end of the table


def test_expected_attention_is_the_gaussian_formula():
    method = make_method("expected_attention")
    rope, tokens, first = Rope(rope_table(), True), 60, SPAN + TAIL - 60
    view = make_view(tokens, seen_tokens=first)
    importance = method.score_layer(view).importance
    flat = rotate(view.q, rope, first, backwards=True)
    turn = mean_rotation(rope, SPAN + TAIL, D)
    for group in range(GROUPS):
        expected = torch.zeros(SPAN - 4)
        for head in range(group * RATIO, (group + 1) * RATIO):
            mean, covariance = flat[:, head].mean(0), torch.cov(flat[:, head].T, correction=0)
            mean, covariance = turn @ mean, turn @ covariance @ turn.T
            keys = view.pool.key[4:SPAN, group]
            logits = keys @ mean / math.sqrt(D) + torch.stack([k @ covariance @ k for k in keys]) / D / 2
            expected += logits.softmax(0) / RATIO
        expected *= view.pool.value[4:SPAN, group].norm(dim=1)
        torch.testing.assert_close(importance[group, 4:], expected, atol=1e-6, rtol=1e-3)
        assert (importance[group, :4] >= expected.max() - 1e-6).all()


def test_expected_attention_leaves_the_sinks_queries_out_when_all_are_run_again():
    method = make_method("expected_attention")
    q, _, _ = make_tensors(SPAN + TAIL)
    job = make_job(Probe(torch.empty(SPAN + TAIL, 48), 0, 0))
    view = LayerView(job, make_pool(), q, torch.zeros(q.shape[:2]), 1)
    spoilt = q.clone()
    spoilt[:4] = 100.0
    expected = method.score_layer(view).importance
    assert torch.equal(method.score_layer(view._replace(q=spoilt)).importance, expected)


@pytest.mark.parametrize("start_slots", [0, 30])
def test_seen_tokens_count_from_the_span(start_slots):
    slots = torch.arange(10)
    job = Job(Plan(start_slots, 100, 20, 0), Probe(torch.empty(5, 48), 90, 200), slots, slots, slots)
    assert LayerView(job, make_pool(), torch.empty(5, 6, 16), torch.empty(5, 6), 0).seen_tokens == 90 - start_slots


# -- settings that do not go together --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in METHODS if not load_method(name).reads_path])
def test_a_path_is_refused_by_a_method_that_reads_none(name):
    with pytest.raises(ValueError, match=f"'there'.*method {name}"):
        load_method(name).check(MetaSoftConfig(method=name, path="there"), SHAPE, 1)
    load_method(name).check(MetaSoftConfig(method=name), SHAPE, 1)


@pytest.mark.parametrize("name", ["chunkkv", "kvcompose"])
def test_methods_that_compare_heads_refuse_tensor_parallelism(name):
    with pytest.raises(ValueError, match=f"{name}.*--tp-size 1, not 2"):
        load_method(name).check(MetaSoftConfig(method=name), SHAPE, 2)


def test_judge_q_needs_a_path():
    with pytest.raises(ValueError, match="judge_q.*--metasoft-path"):
        load_method("judge_q").check(MetaSoftConfig(method="judge_q"), SHAPE, 1)


@pytest.mark.parametrize(("gate", "expected"), [(0.0, "key_bias"), (0.5, "attention_flow")])
def test_a_compressor_whose_gate_is_shut_biases_keys_and_spares_the_routing(gate, expected, tmp_path):
    soft_tokens = make_method("metasoft").soft_tokens
    soft_tokens.gate_scale.data.fill_(gate)
    soft_tokens.save(tmp_path, SHAPE)
    method = make_method("metasoft", path=str(tmp_path))
    assert method.default_consolidation == expected and expected in method.description
    probe = make_probe(method, make_prompt())
    q, k, v = make_tensors(probe.embeds.shape[0])
    for consolidation, is_same in ((None, True), ("attention_flow", True), ("none", gate == 0)):
        asked = make_method("metasoft", path=str(tmp_path), consolidation=consolidation)
        _, _, merged, _ = compress_layer(make_job(probe), q, k, v, make_pool(), asked, asked.gate_scale(1, 0, 3), 1)
        if consolidation is None:
            first = merged.value
        assert torch.equal(merged.value, first) is is_same
    other = make_method("metasoft", path=str(tmp_path), gate_scale=0.5 - gate)
    assert other.default_consolidation == ("none" if gate == 0.5 else "attention_flow")
    assert other.gate_scale(1, 0, 3) == 0.5 - gate
