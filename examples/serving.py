"""A server for the examples: the given one, or one on the demo model."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sglang_metasoft.demo import model as demo_model
from sglang_metasoft.local_server import Server


@contextlib.contextmanager
def serve_demo(url: str | None, flags: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield ``url``, or that of a compressing server on the demo model, which ends with the block."""
    if url is not None:
        yield url
        return
    model = demo_model.prepare(demo_model.PATH)
    with tempfile.TemporaryDirectory() as scratch:
        with Server(model, ["--enable-metasoft", *flags], log=Path(scratch) / "server.log") as server:
            yield server.url
