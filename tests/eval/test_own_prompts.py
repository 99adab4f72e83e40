"""A user's own prompts, from a file."""

import json

import pytest

from sglang_metasoft.cli import main
from sglang_metasoft.eval import report
from sglang_metasoft.eval.case import render
from sglang_metasoft.eval.own import own_cases, read_own
from sglang_metasoft.eval.records import read_records

GOOD = {"prompt": "What is this?"}


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (['{"prompt": "a"}', "{broken"], "line 2: not JSON"),
        (["[1]"], 'line 1: [1] is no object; allowed: {"messages"'),
        (['{"text": "a"}'], "line 1: key 'text' is unknown; allowed: {"),
        (['{"answer": "a"}'], 'line 1: either "messages" or "prompt" must be there'),
        (['{"prompt": "a", "messages": []}'], 'line 1: either "messages" or "prompt"'),
        (['{"prompt": 3}'], 'line 1: "prompt" is 3, no text'),
        (["", '{"prompt": "a", "answer": ""}'], "line 2: \"answer\" is '', no text"),
        (['{"prompt": "a", "id": [1]}'], 'line 1: "id" is [1], neither text nor a whole number'),
        (['{"prompt": "a", "id": 1}', '{"prompt": "b", "id": "1"}'], "line 2: \"id\" '1' is that of line 1 too"),
        (['{"messages": "hello"}'], "line 1: \"messages\" is 'hello', no list of messages"),
        (['{"messages": [{"role": "boss", "content": "a"}]}'], "has no role of system, developer, user"),
        (['{"messages": [{"role": "user", "content": null}]}'], "has no text as content"),
        (['{"messages": [{"role": "assistant", "content": "a"}]}'], "the last message is no question of the user"),
        ([""], "has no prompt; allowed: {"),
    ],
)
@pytest.mark.parametrize("command", [["eval-hf", "--model", "/nowhere"], ["eval", "--url", "http://127.0.0.1:9"]])
def test_a_broken_line_is_named_before_any_work(command, lines, words, tmp_path, capsys):
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(lines) + "\n")
    assert main([*command, "--tasks", str(path), "--output", str(tmp_path / "out.jsonl")]) == 2
    message = capsys.readouterr().err
    assert words in message and "mine.jsonl" in message and message.count("\n") == 1
    assert not (tmp_path / "out.jsonl").exists()


def test_a_missing_file_is_named(tmp_path, capsys):
    assert main(["eval", "--tasks", str(tmp_path / "no.jsonl"), "--output", str(tmp_path / "out.jsonl")]) == 2
    assert "no.jsonl' cannot be read" in capsys.readouterr().err


def chat(*texts):
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


@pytest.fixture(scope="module")
def mine(document, tmp_path_factory):
    path = tmp_path_factory.mktemp("mine") / "mine.jsonl"
    rows = [
        {"prompt": document[:4500], "id": "raw"},
        {"messages": chat(document[:4500] + "\n\nWho speaks?"), "id": "one", "answer": "The president"},
        {"messages": chat(document[:4500], "Go on.", "What does he ask for?"), "id": "chat"},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_prompts_are_what_the_template_makes_of_them(mine, tokenizer):
    raw, one, several, short = own_cases(mine, read_own(mine), tokenizer)
    assert tokenizer.decode(render(raw, 0, tokenizer).ids) == raw.turns[0].question
    for case in (one, several, short):
        prompt = render(case, 0, tokenizer)
        wanted = tokenizer.apply_chat_template(list(case.messages), tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(prompt.ids) == prompt.text == wanted
    prompt = render(several, 0, tokenizer)
    assert tokenizer.decode(prompt.ids[: prompt.boundary_tokens]).endswith("Go on.<|im_end|>\n<|im_start|>user\n")
    assert render(one, 0, tokenizer).boundary_tokens == 0
    assert one.turns[0].answers == ("The president",) and raw.turns[0].answers == ()
    assert short.details["document"].startswith("mine/") and raw.details["document"] == "mine/raw"


def test_a_changed_line_is_another_case_and_a_moved_one_the_same(mine, tokenizer, tmp_path):
    lines = mine.read_text().splitlines()
    moved = tmp_path / "mine.jsonl"
    moved.write_text("\n".join([*lines[1:], lines[0].replace('"raw"', '"new"')]))
    before, after = ([case.index for case in own_cases(path, read_own(path), tokenizer)] for path in (mine, moved))
    assert after[:3] == before[1:] and after[3] not in before


def test_own_prompts_in_process(mine, model_dir, data_folder, tmp_path):
    path = tmp_path / "own.jsonl"
    command = ["eval-hf", "--model", str(model_dir), "--methods", "snapkv", "--tasks", str(mine), "--ratios", "2", "4"]
    assert main([*command, "--modes", "inside", "after", "--data", str(data_folder), "--output", str(path)]) == 0
    records = read_records(path)
    found = {(r["document"].split("/")[1], r["mode"], r["ratio"]): r for r in records if r["method"] == "snapkv"}
    for name, mode in (("raw", "inside"), ("one", "inside"), ("chat", "inside"), ("chat", "after")):
        half, quarter = found[name, mode, 2.0], found[name, mode, 4.0]
        assert half["problem"] is None if "problem" in half else True
        assert half["tokens"] == quarter["tokens"] > 0 and quarter["kv_tokens"] < half["kv_tokens"]
        assert half["nats"] != quarter["nats"]
    assert found["raw", "after", 4.0]["problem"] == "boundary" and found["raw", "after", 4.0]["score"] is None
    assert {r["problem"] for r in records if r["ratio"] != 1 and r["prompt_tokens"] < 100} == {"too_short"}
    # The model of these tests babbles: no answer is right, of the full cache as of the compressed one.
    assert {r["exact"] for r in records if "/one" in r["document"] and not r.get("problem")} == {False}
    assert not any("exact" in r for r in records if "/one" not in r["document"])
    (row,) = [
        r for r in report.summarise(records)["fidelity"] if (r["mode"], r["ratio"], r["kind"]) == ("inside", 4, "all")
    ]
    assert row["split"] == "own" and row["documents"] == 3 and (row["exact"], row["references"]) == (0, 1)
    assert "The full cache's own answer: own, prompts as they are, question inside" in report.markdown(
        report.summarise(records)
    )
