"""Tables in the pages that are made from the code; ``python docs/hooks.py`` writes them again, a test compares.

Each stands between ``<!-- generated: NAME -->`` and ``<!-- end -->``, so that the pages read well on a forge too. As a
hook of MkDocs this takes the marks out.
"""

import re
from pathlib import Path

from metasoft_patches.compat import support_matrix
from metasoft_patches.metrics import metrics_table

from sglang_metasoft.config import RequestOptions, settings_of
from sglang_metasoft.types import Bypass

BLOCK = re.compile(r"<!-- generated: (\w+) -->\n.*?<!-- end -->", re.DOTALL)
NAME = re.compile(r"<td>(?=<code>[^\s<]+</code></td>)")  # a cell with one name, and nothing else
FIGURE = re.compile(r"<td>(?=[^<]{1,16}\)</td>)")  # a figure with its interval
MARK = re.compile(r"<!-- (generated: \w+|end) -->\n?")


def cell(text: str) -> str:
    return str(text).replace("|", r"\|")


def flags() -> str:
    """Every setting: flag or JSON key, default, allowed values, meaning."""
    rows = ["| flag | JSON key | default | allowed | |", "|---|---|---|---|---|"]
    for name, field in settings_of().items():
        flag, meta = field.metadata["flag"], field.metadata
        default = "" if field.default is None else field.default
        rows.append(
            f"| {f'`{flag}`' if flag else ''} | `{name}` | {cell(default)} | {cell(meta['allowed'])} | "
            f"{cell(meta['help'])} |"
        )
    return "\n".join(rows)


def request_fields() -> str:
    """What ``custom_params`` may carry."""
    rows = ["| field | allowed | |", "|---|---|---|"]
    for key, name in RequestOptions.FIELDS.items():
        meta = RequestOptions.field(name).metadata
        rows.append(f"| `{key}` | {cell(RequestOptions.allowed(name))} | {cell(meta['help'])} |")
    return "\n".join(rows)


def bypasses() -> str:
    """Every reason not to compress, and what it means."""
    rows = ["| `metasoft_bypass` | the request |", "|---|---|"]
    rows += [f"| `{reason.value}` | {cell(reason.why)} |" for reason in Bypass]
    return "\n".join(rows)


TABLES = {
    "flags": flags,
    "request_fields": request_fields,
    "bypasses": bypasses,
    "support_matrix": support_matrix,
    "metrics": metrics_table,
}


def filled(markdown: str) -> str:
    """The page with every table as the code has it. Raises KeyError: no table has that name."""
    return BLOCK.sub(lambda match: f"<!-- generated: {match[1]} -->\n\n{TABLES[match[1]]()}\n\n<!-- end -->", markdown)


def on_page_markdown(markdown: str, **kwargs) -> str:
    """Called by MkDocs for each page."""
    return MARK.sub("", filled(markdown))


def on_page_content(html: str, **kwargs) -> str:
    """Called by MkDocs for each page: classes for ``tables.css``."""
    return FIGURE.sub('<td class="figure">', NAME.sub('<td class="name">', html))


if __name__ == "__main__":
    for page in Path(__file__).parent.glob("*.md"):
        page.write_text(filled(page.read_text()))
