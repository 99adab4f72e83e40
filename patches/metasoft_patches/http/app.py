"""Puts the header middleware around SGLang's HTTP application, in whichever process that serves."""

import os
import sys

from sglang.srt.environ import envs

from metasoft_patches.http.headers import HeaderMiddleware

SERVER_MODULE = "sglang.srt.entrypoints.http_server"
WORKER_APP = "metasoft_patches.http.worker:app"
APP_PATH = "SGLANG_HTTP_SERVER_APP_PATH"  # what SGLang's HTTP workers import
INNER_APP_PATH = "METASOFT_HTTP_SERVER_APP_PATH"  # what they would import without us


def prepare(tokenizer_workers: int) -> None:
    """In the parent process, before the HTTP server starts. Without one, for ``sgl.Engine``, nothing happens.

    Raises:
        ValueError: several HTTP processes, in a version that does not let their application be named.
    """
    if tokenizer_workers > 1:
        # They are started afresh and load no plugins: their requests would reach the scheduler unchecked.
        if not hasattr(envs, APP_PATH):
            raise ValueError(
                f"--enable-metasoft: --tokenizer-worker-num {tokenizer_workers} is not supported in this SGLang: its "
                "workers load no plugins; allowed: 1"
            )
        if os.environ.get(APP_PATH) != WORKER_APP:
            os.environ[INNER_APP_PATH] = getattr(envs, APP_PATH).get()
            os.environ[APP_PATH] = WORKER_APP
    elif (server := sys.modules.get(SERVER_MODULE)) is not None:  # it is what calls us, if there is one
        add_middleware(server.app)


def add_middleware(app) -> None:
    """Wrap the application, once."""
    if not any(middleware.cls is HeaderMiddleware for middleware in app.user_middleware):
        app.add_middleware(HeaderMiddleware)
