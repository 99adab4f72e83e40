"""A measurement as a file that may be kept: what was run, on what, when, and what came out."""

import json
import sys
from pathlib import Path

from sglang_metasoft.bench.run import describe_machine


def write(path: Path, result: dict | list) -> None:
    """Write ``result`` to ``path`` as JSON, beside this process's command, machine, versions and date."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {"command": " ".join(["python", *sys.argv]), "machine": describe_machine(), "result": result}
    path.write_text(json.dumps(whole, indent=1) + "\n")
