"""Cases fit their length, are the same for the same seed, and hold their answers."""

import json
import re
from collections import Counter

import pytest

from sglang_metasoft.eval.case import make_case, render
from sglang_metasoft.eval.data import fetch
from sglang_metasoft.eval.tasks import GROUPS, TASKS, find_tasks
from sglang_metasoft.eval.tasks.needle import GRID_DEPTHS, NEEDLE

OFFLINE = [name for name in TASKS if not name.startswith("longbench/")]
# What the prompt does not hold: a count, a summary, a class that no example had, a next line, a number of a paragraph.
NATURAL = {*GROUPS["natural"], *GROUPS["natural_frozen"]}  # there the full cache answers
ANSWER_ELSEWHERE = {
    "lb_count",
    "lb_summary",
    "lb_few_shot",
    "lb_code",
    "lb_retrieval",
    "sc_many_shot",
    "book_perplexity",
}


@pytest.mark.parametrize("name", OFFLINE)
@pytest.mark.parametrize("length", [1024, 2048])
def test_a_case_fits_and_nearly_fills_its_length(name, length, tokenizer, sources):
    case = make_case(TASKS[name], tokenizer, sources, length, 1, 0)
    used = len(render(case, len(case.turns) - 1, tokenizer).ids) + case.max_new_tokens
    assert used <= length
    if name not in ("lb_code", "lb_few_shot", "sc_many_shot"):  # whose test texts end
        assert used > 0.8 * length


@pytest.mark.parametrize("name", OFFLINE)
def test_same_seed_same_case_other_seed_other_case(name, tokenizer, sources):
    first = make_case(TASKS[name], tokenizer, sources, 1024, 1, 3)
    assert make_case(TASKS[name], tokenizer, sources, 1024, 1, 3) == first
    assert make_case(TASKS[name], tokenizer, sources, 1024, 2, 3) != first
    assert make_case(TASKS[name], tokenizer, sources, 1024, 1, 4) != first


@pytest.mark.parametrize("name", sorted(set(OFFLINE) - ANSWER_ELSEWHERE - NATURAL))
def test_answers_are_in_the_document(name, tokenizer, sources):
    for index in range(3):
        case = make_case(TASKS[name], tokenizer, sources, 1024, 1, index)
        for turn in case.turns:
            assert turn.answers and all(answer in case.document for answer in turn.answers), turn


def test_boundary_is_the_document_and_text_is_what_ids_say(tokenizer, sources):
    case = make_case(TASKS["niah_multiquery"], tokenizer, sources, 1024, 1, 0)
    prompt = render(case, 0, tokenizer)
    assert tokenizer.decode(prompt.ids[: prompt.boundary_tokens]).endswith(case.document)
    assert tokenizer.decode(prompt.ids[prompt.boundary_tokens : prompt.question_end_tokens]) == case.turns[0].question
    assert tokenizer.decode(prompt.ids) == prompt.text
    assert prompt.text.endswith("assistant\n" + case.turns[0].answer_prefix)


def test_a_later_turn_holds_the_earlier_ones_with_true_answers(tokenizer, sources):
    case = make_case(TASKS["sc_kv"], tokenizer, sources, 1024, 1, 0)
    first, last = render(case, 0, tokenizer), render(case, 3, tokenizer)
    assert last.ids[: first.boundary_tokens] == first.ids[: first.boundary_tokens]
    for turn in case.turns[:3]:
        assert f"{turn.answer_prefix} {turn.answers[0]}<|im_end|>" in last.text
    assert case.turns[3].answers[0] not in last.text[len(case.document) + 200 :]


def test_needle_counts_are_those_of_the_benchmark(tokenizer, sources):
    expected = {"niah_single_1": 1, "niah_multikey_1": 4, "niah_multivalue": 4, "niah_multiquery": 4}
    start = NEEDLE.split("{")[0]
    for name, count in expected.items():
        document = make_case(TASKS[name], tokenizer, sources, 1024, 1, 0).document
        assert document.count(start) == count, name
    assert make_case(TASKS["niah_multikey_2"], tokenizer, sources, 1024, 1, 0).document.count(start) > 15
    assert len(make_case(TASKS["niah_multivalue"], tokenizer, sources, 1024, 1, 0).turns[0].answers) == 4


def test_the_grid_puts_its_needle_where_it_says(tokenizer, sources):
    for index, depth in enumerate(GRID_DEPTHS):
        case = make_case(TASKS["niah_grid"], tokenizer, sources, 2048, 1, index)
        place = case.document.index("One of the special magic") / len(case.document)
        assert case.details["depth"] == depth and abs(place - depth / 100) < 0.12


def test_a_variable_chain_is_in_order(tokenizer, sources):
    case = make_case(TASKS["vt"], tokenizer, sources, 1024, 1, 0)
    names = case.turns[0].answers
    body = case.document.split("Memorize and track")[-1]
    assert len(names) == 5
    places = [body.index(f"VAR {name} = VAR {source}") for source, name in zip(names, names[1:], strict=False)]
    assert places == sorted(places)


def test_common_words_are_the_most_common(tokenizer, sources):
    case = make_case(TASKS["cwe"], tokenizer, sources, 1024, 1, 0)
    words = re.split(r" ?\d+\. ", case.document.split("often.\n")[-1])[1:]
    counts = Counter(words)
    assert {word for word, count in counts.items() if count == 6} == set(case.turns[0].answers)
    assert set(counts.values()) == {1, 6}


def test_a_length_too_short_is_refused(tokenizer, sources):
    with pytest.raises(ValueError, match=r"'niah_single_1' needs \d+ tokens; length_tokens=100 is too short"):
        make_case(TASKS["niah_single_1"], tokenizer, sources, 100, 1, 0)


def test_unknown_tasks_and_texts_are_refused_with_the_list():
    with pytest.raises(ValueError, match="task 'ruller' is unknown; allowed: the groups ruler.*niah_single_1"):
        find_tasks(["ruller"])
    with pytest.raises(ValueError, match="'poem.txt' is unknown; allowed: austen.txt"):
        fetch("poem.txt", None)


def test_ruler_has_thirteen_tasks_and_longbench_six_categories():
    assert len(GROUPS["ruler"]) == 13
    families = {task.family for task in find_tasks(["longbench"])}
    assert families == {"qa", "summary", "classification", "retrieval", "counting", "code"}


def test_official_longbench_is_read_from_its_files(tokenizer, data_folder, sources):
    (data_folder / "longbench").mkdir(exist_ok=True)
    item = {
        "context": "Ann keeps bees. " * 400 + "The end.", "input": "What does Ann keep?", "answers": ["bees"],
        "all_classes": None,
    }  # fmt: skip
    (data_folder / "longbench" / "multifieldqa_en.jsonl").write_text(json.dumps(item) + "\n")
    case = make_case(TASKS["longbench/multifieldqa_en"], tokenizer, sources, 1024, 1, 0)
    assert case.document.endswith("The end.") and "What does Ann keep?" in case.turns[0].question
    assert 900 < len(render(case, 0, tokenizer).ids) + case.max_new_tokens <= 1024
