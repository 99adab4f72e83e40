"""Result files: resumed, never silently scored, repaired after an interruption."""

import json

import pytest

from sglang_metasoft.eval.case import Case, Turn
from sglang_metasoft.eval.records import Store, cut, is_settled, make_key, make_record

CASE = Case("vt", "tracing", 3, 1, 2048, "a document", (Turn("?", ("AB", "CD")),), "string_match_all", 30)


def test_a_finished_answer_is_known_after_a_restart(tmp_path):
    path = tmp_path / "new" / "results.jsonl"
    store = Store(path)
    store.add(make_record(CASE, 0, "inside", "snapkv", 4, prediction="AB and CD"))
    assert json.loads(path.read_text())["score"] == 1
    again = Store(path)
    assert make_key(CASE, 0, "inside", "snapkv", 4) in again
    assert (
        make_key(CASE, 0, "inside", "snapkv", 8) not in again and make_key(CASE, 0, "after", "snapkv", 4) not in again
    )


def test_a_line_that_was_cut_off_is_dropped(tmp_path):
    path = tmp_path / "results.jsonl"
    store = Store(path)
    for ratio in (4, 8):
        store.add(make_record(CASE, 0, "inside", "snapkv", ratio, prediction="AB"))
    path.write_text(path.read_text()[:-20])
    assert [record["ratio"] for record in Store(path).records] == [4]
    assert path.read_text().endswith("}\n")


def test_an_answer_with_a_problem_has_no_score():
    record = make_record(CASE, 0, "after", "snapkv", 4, prediction="AB CD", problem="too_short")
    assert record["score"] is None and record["problem"] == "too_short"


def test_a_book_is_scored_by_its_mean_log_probability():
    book = Case("book_perplexity", "language", 0, 1, 2048, "text", (Turn(" more", ()),), "perplexity", 0)
    record = make_record(book, 0, "after", "snapkv", 4, prediction="", logprobs=[-1.0, -3.0])
    assert record["score"] == -2 and record["scored_tokens"] == 2


def test_bad_files_are_refused(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"task": "vt"}\n')
    with pytest.raises(ValueError, match="line 1 is no evaluation record"):
        Store(path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        Store(tmp_path / "file" / "results.jsonl")


def test_stop_strings_and_early_ends():
    assert cut("Date\nQuestion: what", ("\n",)) == "Date"
    assert is_settled(CASE, 0, "AB, CD") and not is_settled(CASE, 0, "AB, C")
