"""Texts, chats and built-in tasks that training is made of."""

import json
import random
import subprocess
import sys

import pytest

from sglang_metasoft.train.dataset import Dataset
from sglang_metasoft.train.mix import GENERATORS
from sglang_metasoft.train.prepare import prepare
from sglang_metasoft.train.texts import HeldOut, read_corpus


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
