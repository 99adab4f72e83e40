"""The pages read well: short lines and sentences, no laboratory diary outside docs/lab, links that lead somewhere."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
LONGEST_LINE_CHARS = 125
LONGEST_SENTENCE_WORDS = 30
MOST_LINES = {"docs/quality.md": 120, "docs/gpu.md": 60, "CONTRIBUTING.md": 50, "CHANGELOG.md": 40}
DIARY = re.compile(r"throw-?away|\bformer\b|\bmean of (the )?seven\b|\bwas shipped before\b", re.IGNORECASE)
ABBREVIATIONS = re.compile(r"\b(e\.g|i\.e|cf|vs|etc)\.")


def groups() -> dict[str, list[str]]:
    """The navigation: group to its pages."""
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    return {name: [next(iter(page.values())) for page in pages] for entry in nav for name, pages in entry.items()}


DEVELOPERS = [f"docs/{page}" for page in groups()["Developers"]]
USERS = ["README.md", *(f"docs/{page}" for name, pages in groups().items() if name != "Developers" for page in pages)]
OTHERS = ["CONTRIBUTING.md", "CHANGELOG.md"]


def prose(markdown: str) -> list[str]:
    """The lines, with an empty one for each that is code, a table, generated, or an HTML comment."""
    for block in (r"<!-- generated: .*?<!-- end -->", r"^( *)```.*?^\1```$"):
        markdown = re.sub(block, lambda found: "\n" * found[0].count("\n"), markdown, flags=re.DOTALL | re.MULTILINE)
    return ["" if re.match(r"\s*(\||<!--|!\[)", line) else line for line in markdown.splitlines()]


def paragraphs(lines: list[str]) -> list[str]:
    """Headings, list items and paragraphs, each on one line."""
    joined: list[str] = []
    is_open = False
    for line in lines:
        begins = re.match(r"\s*(#+ |[-*] |\d+\. )", line)
        if line.strip() and is_open and not begins:
            joined[-1] += " " + line.strip()
        elif line.strip():
            joined.append(line.strip())
        is_open = bool(line.strip()) and not line.startswith("#")
    return joined


def sentences(paragraph: str) -> list[str]:
    """Its sentences; inline code counts as one word, a link as its text."""
    text = re.sub(r"`[^`]*`", "code", paragraph)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = ABBREVIATIONS.sub(lambda found: found[0].replace(".", ""), text.replace("**", "").replace("*", ""))
    text = re.sub(r"^([-*]|\d+\.|#+) ", "", text)
    return re.split(r"(?<=[.!?])[\"')]*\s+", text)


def words(sentence: str) -> int:
    return sum(bool(re.search(r"\w", word)) for word in sentence.split())


def test_sentences_are_told_apart():
    text = "1. It has `a.b. C` (e.g. 3.5 GB), see [the page. It is long](x.md). `Then` it ends. Why? 2 more"
    assert [words(sentence) for sentence in sentences(text)] == [9, 3, 3, 1, 2]
    lines = prose("# A\n\nOne\ntwo\n- three\n  four\n\n| t |\n\n```bash\ncode\n```\nfive\n")
    assert paragraphs(lines) == ["# A", "One two", "- three four", "five"]


@pytest.mark.parametrize("page", [*USERS, *DEVELOPERS, *OTHERS])
def test_lines_are_short(page):
    lines = (ROOT / page).read_text().splitlines()
    shown = prose((ROOT / page).read_text())
    assert [line for line in shown if len(line) > LONGEST_LINE_CHARS] == []
    assert len(lines) <= MOST_LINES.get(page, len(lines))


@pytest.mark.parametrize("page", [*USERS, *OTHERS])
def test_sentences_are_short(page):
    found = [text for part in paragraphs(prose((ROOT / page).read_text())) for text in sentences(part)]
    assert [text for text in found if words(text) > LONGEST_SENTENCE_WORDS] == []


@pytest.mark.parametrize("page", [*USERS, *DEVELOPERS, *OTHERS])
def test_the_laboratory_diary_is_in_the_lab(page):
    assert DIARY.findall((ROOT / page).read_text()) == []


@pytest.mark.parametrize("page", ["README.md", *OTHERS])
def test_links_into_the_repository_lead_somewhere(page):
    """MkDocs checks those between the pages of docs/."""
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text())
    assert [link for link in links if not (ROOT / link).exists()] == []
