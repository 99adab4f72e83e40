"""Natural documents: two splits that share nothing, none of it from training."""

import inspect
import re

import pytest

from sglang_metasoft.eval import data, documents
from sglang_metasoft.eval.case import answered, make_case, render
from sglang_metasoft.eval.data import FETCHERS, Sources
from sglang_metasoft.eval.tasks import GROUPS, TASKS, natural
from sglang_metasoft.eval.tasks.natural import DEVELOPMENT, FROZEN, KINDS, pieces_of
from sglang_metasoft.train import fetch_texts


class Watched(Sources):
    """Remembers which files were read."""

    def __init__(self, folder):
        super().__init__(folder)
        self.names = set()

    def _get(self, name, parse):
        self.names.add(name)
        return super()._get(name, parse)


def documents_of(split, folder):
    """File and name of every document of a split."""
    found = set()
    for kind in KINDS:
        if kind.split == split:
            sources = Watched(folder)
            names = [name for name, _ in kind.load(sources)]
            assert len(names) == len(set(names)) > 0, kind.name
            (file,) = sources.names
            found |= {(file, name) for name in names}
    return found


def test_no_document_is_in_two_splits(data_folder):
    development, frozen = (documents_of(split, data_folder) for split in (DEVELOPMENT, FROZEN))
    assert not development & frozen
    # One source serves both splits in two cases alone, where a document's own name tells them apart.
    assert {file for file, _ in development} & {file for file, _ in frozen} == {"licenses.json", "logs.json"}
    assert {file for file, _ in development | frozen} <= set(FETCHERS)


def test_no_request_is_in_two_splits():
    asked = {split: set() for split in (DEVELOPMENT, FROZEN)}
    for kind in KINDS:
        asked[kind.split] |= {kind.opening, *kind.requests, *kind.further}
        assert len(kind.requests) >= 5 and len(kind.further) >= 2
    assert not asked[DEVELOPMENT] & asked[FROZEN]


def test_each_split_has_ten_kinds():
    for split, group in ((DEVELOPMENT, "natural"), (FROZEN, "natural_frozen")):
        kinds = [kind.name for kind in KINDS if kind.split == split]
        assert len(kinds) == len(set(kinds)) == 10 == len(GROUPS[group])


def test_nothing_is_taken_from_where_training_text_comes_from():
    source = inspect.getsource(documents) + inspect.getsource(data) + inspect.getsource(natural)
    for package in (*fetch_texts.PIP, *fetch_texts.DEBIAN):
        name = package.split("==")[0]
        assert not re.search(rf"[\"']{re.escape(name)}\\b", source), name


def test_the_first_documents_of_cases_differ(tokenizer, sources):
    task = TASKS["natural_licence"]
    names = [make_case(task, tokenizer, sources, 1024, 1, index).details["document"] for index in range(20)]
    assert len(set(names)) == 20


def test_a_later_turn_stands_on_what_the_full_cache_said(tokenizer, sources):
    cases = [make_case(TASKS["natural_tale"], tokenizer, sources, 1024, 1, index) for index in range(8)]
    two = next(case for case in cases if len(case.turns) == 2)
    assert any(len(case.turns) == 1 for case in cases)
    text = render(answered(two, 0, "He went home."), 1, tokenizer).text
    before, after = text.split("He went home.")
    assert before.endswith(two.turns[0].question + "<|im_end|>\n<|im_start|>assistant\n")
    assert two.turns[1].question in after


def test_a_long_table_keeps_its_head(tokenizer, data_folder, tmp_path):
    import json

    rows = "\n".join(f"{n},{n * n}" for n in range(5000))
    (tmp_path / "vega_tables.json").write_text(json.dumps([["squares", "number,square\n" + rows]]))
    case = make_case(TASKS["natural_table"], tokenizer, Sources(tmp_path), 700, 1, 0)
    assert case.document.startswith("Here is a table in CSV form.\n\nnumber,square\n")
    numbers = [int(line.split(",")[0]) for line in case.document.split("\n")[3:-1]]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))


def test_pieces_are_the_text():
    text = "One sentence. Another:\n\nA line\nand one, 3.14 long!\nEnd"
    assert "".join(pieces_of(text)).rstrip() == text
    assert pieces_of(text) == ["One sentence. ", "Another:\n\n", "A line\n", "and one, 3.14 long!\n", "End\n\n"]


@pytest.mark.parametrize("missing", ["reddit.json", "celery.json"])
def test_what_cannot_be_fetched_is_named(missing, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(data, "download_from_pip", fail)
    monkeypatch.setattr(documents, "download_from_pip", fail)
    with pytest.raises(ValueError, match=f"'{missing}' could not be fetched .no network.; put it into .*{missing}"):
        Sources(tmp_path).documents(missing)
