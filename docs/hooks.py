"""MkDocs hook: fills ``<!-- generated: NAME -->`` marks with tables made from the code."""

import re

from sglang_metasoft.compat import support_matrix
from sglang_metasoft.config import RequestOptions, settings_of
from sglang_metasoft.metrics import metrics_table
from sglang_metasoft.types import Bypass

MARK = re.compile(r"<!-- generated: (\w+) -->")


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


def on_page_markdown(markdown: str, **kwargs) -> str:
    """Called by MkDocs for each page; an unknown name ends the build."""
    return MARK.sub(lambda match: TABLES[match[1]](), markdown)
