"""Natural fidelity in process, on the first layers of the demo model in float32."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from sglang_metasoft.cli import main
from sglang_metasoft.config import MetaSoftConfig
from sglang_metasoft.eval import report
from sglang_metasoft.eval.fidelity import Reading
from sglang_metasoft.eval.hf import Compressor, MethodSpec
from sglang_metasoft.eval.records import FULL, read_records
from sglang_metasoft.eval.statistics import by_document, fidelity
from sglang_metasoft.eval.teacher_forcing import read
from sglang_metasoft.hf.cache import Batch, generate, joined
from sglang_metasoft.hf.model import HFModel
from sglang_metasoft.types import Plan

TASKS = ["natural_tale", "natural_log", "natural_licence"]
WINDOW, SINK = MetaSoftConfig().window, MetaSoftConfig().sink


@pytest.fixture(scope="module")
def command(model_dir, data_folder):
    return [
        "eval-hf", "--model", str(model_dir), "--data", str(data_folder), "--methods", "streaming_llm", "oracle",
        "--tasks", *TASKS, "--lengths", "900", "--ratios", "4", "--cases", "2", "--modes", "inside", "repeat", "after",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def results(command, tmp_path_factory):
    path = tmp_path_factory.mktemp("fidelity") / "hf.jsonl"
    assert main([*command, "--output", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def model(model_dir):
    return HFModel(model_dir, torch.device("cpu"), torch.float32)


def test_the_full_cache_follows_itself(results):
    full = [record for record in read_records(results) if record["method"] == FULL]
    assert {record["mode"] for record in full} == {"inside", "repeat", "after"}
    for record in full:
        assert record["score"] == 1 and record["nats"] == 0 and 0 < record["nll"] < 5
        # The first token comes from the full prompt, inside.
        assert record["tokens"] == len(record["answer_ids"]) - (record["mode"] == "inside")
        assert len(record["answer_ids"]) <= 48


def test_later_turns_are_asked_after_the_document_alone(results):
    later = [record for record in read_records(results) if record["turn"] == 1]
    assert later and {record["mode"] for record in later} == {"after"}


def test_the_oracle_follows_better_than_sinks_and_window(results):
    rows = {
        (r["mode"], r["method"]): r for r in report.summarise(read_records(results))["fidelity"] if r["kind"] == "all"
    }
    for mode in ("inside", "after"):
        oracle, blind = rows[mode, "oracle"], rows[mode, "streaming_llm"]
        assert oracle["kept"] >= blind["kept"] and oracle["nats"] < blind["nats"], mode
        assert blind["kept"] < 1


def test_a_second_run_computes_nothing_and_a_lost_half_is_computed_again(command, results, tmp_path):
    before = results.read_text()
    assert main([*command, "--output", str(results)]) == 0
    assert results.read_text() == before
    lines = before.splitlines(keepends=True)
    half = tmp_path / "half.jsonl"
    half.write_text("".join(lines[: len(lines) // 2]))
    assert main([*command, "--output", str(half)]) == 0
    assert len(read_records(half)) == len(lines)
    for old, new in zip(read_records(results), read_records(half), strict=True):
        assert (old["task"], old["mode"], old["method"], old["tokens"], old["agreed"]) == (
            new["task"], new["mode"], new["method"], new["tokens"], new["agreed"],
        )  # fmt: skip
        assert old["nats"] == pytest.approx(new["nats"], abs=1e-5)


@pytest.fixture(scope="module")
def prompt_ids(model, document):
    return model.encode(document)[:700]


def masked(model_dir, prompt_ids, answer_ids, hidden):
    """Logits after the prompt's last token and each of the answer's, from transformers' own attention.

    Args:
        hidden: positions of the prompt that the answer's tokens do not see.
    """
    plain = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager")
    ids = torch.tensor([prompt_ids + answer_ids])
    size = ids.shape[1]
    visible = torch.ones(size, size, dtype=torch.bool).tril()
    visible[len(prompt_ids) :, hidden] = False
    mask = torch.zeros(size, size).masked_fill(~visible, torch.finfo(torch.float32).min)[None, None]
    with torch.no_grad():
        return plain(input_ids=ids, attention_mask=mask).logits[0, len(prompt_ids) - 1 :]


def test_the_numbers_are_those_of_a_mask_over_transformers_own_attention(model, model_dir, prompt_ids):
    """Sinks and window: what the answer sees is known without any of this project's code."""
    prefilled = model.prefill(prompt_ids)
    (answer,) = generate(Batch(model, [prefilled.layers], 24), [prefilled.logits.argmax().item()], 700, 24)
    span, kept = 700 - WINDOW, 100
    compressor = Compressor(model, MethodSpec.parse("streaming_llm"))
    (row,) = compressor.compress(prefilled.layers, prompt_ids, [Plan(0, span, kept, SINK, False)], answer)
    row = [joined(merged, raw, span) for merged, raw in zip(row, prefilled.layers, strict=True)]
    assert row[0].key.shape[0] == kept + WINDOW
    full, compressed = read(model, [prefilled.layers, row], [], 700, answer)

    for reading, hidden in ((full, []), (compressed, list(range(SINK, span - (kept - SINK))))):
        logits = masked(model_dir, prompt_ids, answer, hidden)[1:-1]  # the first token is the full prompt's
        targets = torch.tensor(answer[1:])
        loss = torch.nn.functional.cross_entropy(logits, targets).item()
        assert reading.tokens == len(answer) - 1
        assert reading.agreed == (logits.argmax(-1) == targets).sum().item()
        assert reading.nll == pytest.approx(loss, abs=1e-4)
    assert compressed.fields(full)["nats"] == pytest.approx(compressed.nll - full.nll) and compressed.nll != full.nll


def test_a_cache_that_keeps_everything_loses_nothing(model, prompt_ids):
    prefilled = model.prefill(prompt_ids)
    (answer,) = generate(Batch(model, [prefilled.layers], 24), [prefilled.logits.argmax().item()], 700, 24)
    compressor = Compressor(model, MethodSpec.parse("snapkv"))
    rows = []
    for kept in (636, 80):
        (row,) = compressor.compress(prefilled.layers, prompt_ids, [Plan(0, 636, kept, SINK, False)], answer)
        rows.append([joined(merged, raw, 636, 699) for merged, raw in zip(row, prefilled.layers, strict=True)])
    full = [type(kv)(kv.key[:699], kv.value[:699]) for kv in prefilled.layers]
    whole, identity, small = read(model, [full, *rows], prompt_ids[699:], 699, answer)
    assert identity.tokens == identity.agreed == len(answer)  # a repeat: its last token is computed anew
    assert identity.fields(whole)["nats"] == pytest.approx(0, abs=1e-5)
    assert small.fields(whole)["nats"] != pytest.approx(0, abs=1e-3)


def test_an_answer_of_one_token_counts_only_where_it_is_predicted(model, prompt_ids):
    prefilled = model.prefill(prompt_ids)
    assert read(model, [prefilled.layers], [], 700, [5]) == [(0, 0, 0.0)]
    shorter = [type(kv)(kv.key[:699], kv.value[:699]) for kv in prefilled.layers]
    (reading,) = read(model, [shorter], prompt_ids[699:], 699, [prefilled.logits.argmax().item()])
    assert (reading.tokens, reading.agreed) == (1, 1)


def record(document, kind, tokens, agreed, nats, **more):
    return {
        "task": f"natural_{kind}", "seed": 1, "length_tokens": 900, "index": hash(document) % 1000, "turn": 0,
        "mode": "inside", "method": "snapkv", "ratio": 4.0, "family": kind, "metric": "fidelity",
        "score": agreed / tokens, "document": document, "kind": kind, "split": "development", "tokens": tokens,
        "agreed": agreed, "nats": nats, **more,
    }  # fmt: skip


RECORDS = [
    record("a", "tale", 40, 40, 0.0), record("a", "tale", 10, 5, 0.5, turn=1),
    record("b", "log", 50, 40, 0.2), record("c", "log", 20, 0, 1.0, problem="too_short", score=None),
]  # fmt: skip


def test_tokens_are_counted_and_documents_are_drawn():
    documents = by_document(RECORDS)
    assert {name: values.tolist() for name, values in documents.items()} == {"a": [50, 45, 5], "b": [50, 40, 10]}
    found = fidelity(documents)
    assert (found["documents"], found["tokens"]) == (2, 100)
    assert found["kept"] == 0.85 and found["kept_worst"] == 0.8 and found["kept_worst_document"] == "b"
    assert found["nats"] == pytest.approx(0.15) and found["nats_worst"] == pytest.approx(0.2)
    # Of two documents a quarter of the samples holds the one alone, a quarter the other.
    assert found["kept_interval"] == (0.8, 0.9) and found["nats_interval"] == pytest.approx((0.1, 0.2))


def test_the_interval_is_that_of_many_documents():
    shares = np.random.default_rng(1).uniform(0.7, 1.0, size=100)
    found = fidelity({str(n): np.array([48, 48 * share, 0.0]) for n, share in enumerate(shares)})
    error = 1.96 * shares.std() / 10
    assert found["kept_interval"] == pytest.approx((shares.mean() - error, shares.mean() + error), abs=0.004)


def test_the_report_shows_the_worst_beside_the_mean_and_every_kind():
    text = report.markdown(report.summarise(RECORDS))
    assert "### The full cache's own answer: development, prompts of 900 tokens, question inside" in text
    assert "| snapkv | 4 | 85.0 (80.0 to 90.0) | 80.0 | +0.150 (+0.100 to +0.200) | +0.200 | 2 | 100 |" in text
    assert "| method | ratio | log | tale |" in text and "| snapkv | 4 | 80.0 (+0.200) | 90.0 (+0.100) |" in text
    assert "| snapkv | inside | too_short | 1 |" in text


def test_a_servers_report_of_another_length_is_refused():
    assert Reading.of([1, 2], [1, 3], [-0.5, -1.5]) == (2, 1, 1.0)
    with pytest.raises(ValueError, match="gave 1 log-probabilities and 2 first choices for 2 tokens"):
        Reading.of([1, 2], [1, 3], [-0.5])
