"""Tables in the pages that are made from the code; ``python docs/hooks.py`` writes them again, a test compares.

Each stands between ``<!-- generated: NAME -->`` and ``<!-- end -->``, so that the pages read well on a forge too. As a
hook of MkDocs this takes the marks out.
"""

import json
import re
import runpy
from pathlib import Path

from metasoft_patches.compat import support_matrix
from metasoft_patches.families import families_table
from metasoft_patches.metrics import metrics_table

from sglang_metasoft.config import settings_of
from sglang_metasoft.request_options import RequestOptions
from sglang_metasoft.types import Bypass

RESULTS = Path(__file__).parent / "results"
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


def percent(row: dict, name: str) -> str:
    low, high = row[f"{name}_interval"]
    return f"{100 * row[name]:.0f} ({100 * low:.0f}–{100 * high:.0f})"


def natural() -> str:
    """First choices kept and rise of the loss on natural documents, from the result file."""
    found = json.loads((RESULTS / "2026-11-28-natural.json").read_text())["rows"]
    lines = [
        "| documents | question | method | 4× kept | 4× nats | 8× kept | 8× nats | worst at 4× |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for split in ("frozen", "development"):
        for mode in ("inside", "after"):
            rows = [row for row in found if (row["split"], row["mode"]) == (split, mode)]
            for method in dict.fromkeys(row["method"] for row in rows):
                four, eight = (next(r for r in rows if (r["method"], r["ratio"]) == (method, n)) for n in (4, 8))
                cells = [f"{percent(row, 'kept')} | {row['nats']:+.2f}" for row in (four, eight)]
                lines.append(f"| {split} | {mode} | {method} | {' | '.join(cells)} | {100 * four['kept_worst']:.0f} |")
    return "\n".join(lines)


def needles() -> str:
    """Shares of the full cache's score on RULER's needles, from the result file."""
    found = json.loads((RESULTS / "2026-11-28-needles.json").read_text())["rows"]
    rows = [row for row in found if row["group"] == "all"]
    columns = [(mode, ratio) for mode in ("inside", "after") for ratio in (4, 8, 16)]
    lines = [f"| method | {' | '.join(f'{mode} {ratio}×' for mode, ratio in columns)} |", "|---" * 7 + "|"]
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = {(r["mode"], r["ratio"]): percent(r, "retention") for r in rows if r["method"] == method}
        lines.append(f"| {method} | {' | '.join(cells[column] for column in columns)} |")
    return "\n".join(lines)


def kv_bytes() -> str:
    """Bytes of KV by token of known models, before and after."""
    return runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "kv_bytes.py"))["table"]()


TABLES = {
    "kv_bytes": kv_bytes,
    "natural": natural,
    "needles": needles,
    "flags": flags,
    "request_fields": request_fields,
    "bypasses": bypasses,
    "support_matrix": support_matrix,
    "families": families_table,
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
