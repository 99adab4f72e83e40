"""Attention maps, targets, texts, generators, and the entry scorer."""

import json
import random
import subprocess
import sys

import pytest
import torch
from metasoft_kernels.merge.key_bias import LARGEST_BIAS, log_biases
from metasoft_kernels.probe import attend
from metasoft_kernels.score import importance
from transformers import AutoModelForCausalLM

from sglang_metasoft.compressor.entry_scorer import EntryScorer
from sglang_metasoft.config import MetaSoftConfig
from sglang_metasoft.consolidations import load_consolidation
from sglang_metasoft.consolidations.repeats import demote_repeats, find_repeats
from sglang_metasoft.methods.metasoft import MetaSoft
from sglang_metasoft.train import key_bias
from sglang_metasoft.train.answer_check import answer_score, cut_slots, kept_slots, shorten, top, with_biases
from sglang_metasoft.train.attention import Probing, Watch
from sglang_metasoft.train.backbone import Backbone, Layers
from sglang_metasoft.train.dataset import Dataset
from sglang_metasoft.train.generators import GENERATORS
from sglang_metasoft.train.objective import losses
from sglang_metasoft.train.prepare import prepare
from sglang_metasoft.train.student import MetaSoftStudent
from sglang_metasoft.train.texts import HeldOut, read_corpus
from sglang_metasoft.types import Job, LayerPool, LayerView, Plan, Probe

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def backbone(tiny_model):
    return Backbone(str(tiny_model), CPU, torch.float32)


@pytest.fixture(scope="module")
def case(backbone, document):
    dataset = Dataset(
        backbone.tokenizer, [document], [], lengths=(80, 120), window=16, repeat_share=1, answer_tokens=8, seed=1
    )
    return next(case for case in map(dataset.__getitem__, range(50)) if case.family == "needles")


@pytest.fixture(scope="module")
def prepared(backbone, case):
    return prepare(backbone, case, 8)


def test_targets_are_the_models_own_attention(backbone, case, prepared, tiny_model):
    """Against eager attention over the whole text at once."""
    eager = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="eager")
    question, answer = case.questions[0], prepared.answers[0]
    ids = torch.tensor([case.prefix + question + answer[:-1]])
    with torch.no_grad():
        maps = torch.stack(eager(ids, output_attentions=True).attentions)[:, 0]  # [layers, H, L, L]
    seen = len(case.prefix) + len(question)
    expected = maps.unflatten(1, (2, 2)).mean(2)[:, :, seen - 1 :].mean(2)  # last prompt token and answer
    torch.testing.assert_close(prepared.tensors["answered.0"], expected[..., :seen], atol=1e-5, rtol=1e-4)
    asked = maps.unflatten(1, (2, 2)).mean(2)[:, :, len(case.prefix) : seen - 1].mean(2)
    torch.testing.assert_close(prepared.tensors["asked.0"], asked[..., :seen], atol=1e-5, rtol=1e-4)


def test_repetition_is_the_largest_attention_of_any_row_and_head(backbone, case, prepared, tiny_model):
    eager = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="eager")
    ids = torch.tensor([case.prefix + case.repeat_request + case.prefix[case.repeat_from :]])
    with torch.no_grad():
        maps = torch.stack(eager(ids, output_attentions=True).attentions)[:, 0]
    start, length = len(case.prefix) + len(case.repeat_request), len(case.prefix)
    expected = maps.unflatten(1, (2, 2))[:, :, :, start:, :length].amax(dim=(2, 3))
    torch.testing.assert_close(prepared.tensors["repeated"], expected, atol=1e-5, rtol=1e-4)


def test_rows_over_a_context_are_the_rows_of_the_whole(backbone, case):
    context = Layers.of(backbone.prefill(case.prefix).layers)
    logits, _ = backbone.rows(backbone.tensor(case.questions[0]), context, logits=True)
    whole, _ = backbone.rows(backbone.tensor(case.prefix + case.questions[0]), None, logits=True)
    torch.testing.assert_close(logits, whole[len(case.prefix) :], atol=1e-4, rtol=1e-4)
    watched, _ = backbone.rows(
        backbone.tensor(case.questions[0]), context, Watch(1, torch.ones(1, len(case.questions[0])) > 0), logits=True
    )
    torch.testing.assert_close(watched, logits, atol=1e-4, rtol=1e-4)


def test_the_probe_sees_what_the_servers_kernels_see(prepared):
    context = prepared.inside(0, 16)
    keys, values = context.layers[1]
    span = len(context.span_ids)
    q = torch.randn(4, 5, 12)
    k_new, v_new = torch.randn(2, 5, 12), torch.randn(2, 5, 12)
    probing = Probing(span)
    joined = (torch.cat([old.float(), new], 1) for old, new in ((keys, k_new), (values, v_new)))
    out = probing(0, q, *joined, 0.3)
    slots = torch.arange(keys.shape[1])
    pool = [t.float().transpose(0, 1) for t in (keys, values)]
    rows = [t.transpose(0, 1) for t in (q, k_new, v_new)]
    expected, lse = attend(rows[0], *pool, slots, *rows[1:], 0.3)
    torch.testing.assert_close(out.transpose(0, 1), expected)
    torch.testing.assert_close(probing.importance[0], importance(rows[0], pool[0], slots[:span], lse, 0.3))


def test_keeping_everything_changes_no_answer(backbone, prepared):
    for context in (prepared.inside(0, 16), prepared.boundary(16)):
        full = answer_score(backbone, context)
        kept = top(context.target, len(context.span_ids))
        assert answer_score(backbone, context, shorten(context, kept)).loss == pytest.approx(full.loss, abs=1e-4)
        assert kept_slots(context, 4) >= 16


def test_the_answers_cut_goes_by_the_span_or_by_the_prompts_budget(prepared):
    for context in (prepared.inside(0, 16), prepared.boundary(16)):
        span = len(context.span_ids)
        assert [cut_slots(context, ratio) for ratio in (1.5, 2.0, 1000.0)] == [-(-2 * span // 3), -(-span // 2), 16]
        assert cut_slots(context, 4, "prompt") == kept_slots(context, 4)


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


def test_overlap_is_found_by_runs_of_words():
    held_out = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    texts = ["ONE, two three four five six seven; eight nine ten eleven twelve thirteen!", "one two three four " * 9]
    assert [HeldOut([held_out]).overlaps(text) for text in texts] == [True, False]
    assert not HeldOut().overlaps(texts[0])


def test_chats_and_texts_are_read_from_rows(tmp_path, document):
    rows = [{"text": document}, {"messages": [{"role": "user", "content": "hello"}]}]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    texts, chats = read_corpus(file)
    assert texts == [document] and chats == [rows[1]["messages"]]


def test_a_chats_last_user_message_is_the_question_and_the_model_answers(backbone, document):
    chat = [
        {"role": "user", "content": document[:500]},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "And why?"},
    ]
    dataset = Dataset(
        backbone.tokenizer, [], [chat], lengths=(80, 400), window=16, repeat_share=0, answer_tokens=8, seed=1
    )
    case = dataset[0]
    assert backbone.tokenizer.decode(case.questions[0]).startswith("And why?") and case.answers == [None]
    assert 1 <= len(prepare(backbone, case, 8).answers[0]) <= 8


@pytest.mark.parametrize("name", GENERATORS)
def test_answers_of_built_in_tasks_are_in_the_document(name, document):
    rng = random.Random(3)
    for _ in range(10):
        task = GENERATORS[name][0](rng, document[3000:6000])
        assert task.questions
        for _, answer in task.questions:
            for part in (answer or "").strip(' ."').split(", "):
                assert part.split("is ")[-1].split(" ")[-1].strip('."') in task.document


def test_cases_do_not_depend_on_the_process(tiny_model, corpus):
    """Sets of strings are ordered by a seed of each process: nothing may rest on it."""
    code = (
        "import sys; from pathlib import Path; from transformers import AutoTokenizer;"
        "from sglang_metasoft.train.dataset import Dataset; from sglang_metasoft.train.texts import read_corpus;"
        f"d = Dataset(AutoTokenizer.from_pretrained({str(tiny_model)!r}), *read_corpus(Path({str(corpus)!r})),"
        "lengths=(80, 120), window=16, repeat_share=0.5, answer_tokens=8, seed=0);"
        "print([d[n]._asdict() for n in range(20)])"
    )
    outputs = {subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout for _ in range(2)}
    assert len(outputs) == 1
