"""Prepared contexts: targets, rows and cuts are those of the model itself and of the server."""

import pytest
import torch
from metasoft_kernels.probe import attend
from metasoft_kernels.score import importance
from transformers import AutoModelForCausalLM

from sglang_metasoft.train.answer_check import answer_score, cut_slots, kept_slots, shorten, top
from sglang_metasoft.train.attention import Probing, Watch
from sglang_metasoft.train.backbone import Layers
from sglang_metasoft.train.prepare import Store, before_loop

MAPS = {"atol": 1e-5, "rtol": 2**-8}  # kept in bfloat16


def test_targets_are_the_models_own_attention(backbone, case, prepared, tiny_model):
    """Against eager attention over the whole text at once."""
    eager = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="eager")
    question, answer = case.questions[0], prepared.answers[0]
    ids = torch.tensor([case.prefix + question + answer[:-1]])
    with torch.no_grad():
        maps = torch.stack(eager(ids, output_attentions=True).attentions)[:, 0]  # [layers, H, L, L]
    seen = len(case.prefix) + len(question)
    expected = maps.unflatten(1, (2, 2)).mean(2)[:, :, seen - 1 :].mean(2)  # last prompt token and answer
    torch.testing.assert_close(prepared.tensors["answered.0"].float(), expected[..., :seen], **MAPS)
    asked = maps.unflatten(1, (2, 2)).mean(2)[:, :, len(case.prefix) : seen - 1].mean(2)
    torch.testing.assert_close(prepared.tensors["asked.0"].float(), asked[..., :seen], **MAPS)


def test_repetition_is_the_largest_attention_of_any_row_and_head(backbone, case, prepared, tiny_model):
    eager = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="eager")
    ids = torch.tensor([case.prefix + case.repeat_request + case.prefix[case.repeat_from :]])
    with torch.no_grad():
        maps = torch.stack(eager(ids, output_attentions=True).attentions)[:, 0]
    start, length = len(case.prefix) + len(case.repeat_request), len(case.prefix)
    expected = maps.unflatten(1, (2, 2))[:, :, :, start:, :length].amax(dim=(2, 3))
    torch.testing.assert_close(prepared.tensors["repeated"].float(), expected, **MAPS)


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
        same = shorten(context, kept, backbone.full_layers)
        assert answer_score(backbone, context, same).loss == pytest.approx(full.loss, abs=1e-4)
        assert kept_slots(context, 4) >= 16


def test_the_answers_cut_goes_by_the_span_or_by_the_prompts_budget(prepared):
    for context in (prepared.inside(0, 16), prepared.boundary(16)):
        span = len(context.span_ids)
        assert [cut_slots(context, ratio) for ratio in (1.5, 2.0, 1000.0)] == [-(-2 * span // 3), -(-span // 2), 16]
        assert cut_slots(context, 4, "prompt") == kept_slots(context, 4)


def test_entries_that_are_not_kept_are_computed_again(backbone, case, prepared, tmp_path):
    """What a large model's prompts would fill a disk with."""
    store = Store(tmp_path, backbone, 8, keeps_entries=False)
    store.get(case)
    size = store.file(case).stat().st_size
    again = store.get(case)
    for name, tensor in prepared.tensors.items():
        torch.testing.assert_close(again.tensors[name].float(), tensor.float(), atol=1e-2, rtol=2**-6)
    kept = sum(t.nbytes for name, t in prepared.tensors.items() if name.startswith(("keys", "values")))
    assert size < sum(t.nbytes for t in prepared.tensors.values()) - kept + 8192


@pytest.mark.parametrize(
    ("ids", "left"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 8], 8),
        ([1, 2, 3, 3, 3, 3, 3, 3, 3], 3),
        ([9, 1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 1], 6),
        ([1, 2, 1, 2, 7, 8], 6),
    ],
)
def test_an_answer_ends_where_it_only_repeats_itself(ids, left):
    assert before_loop(ids) == ids[:left]
