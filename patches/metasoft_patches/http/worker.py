"""The HTTP application of a server with several tokenizer workers; each of them imports it in a process of its own."""

import os

from sglang.srt.plugins import load_plugins
from uvicorn.importer import ImportFromStringError, import_from_string

from metasoft_patches.adapter import load_adapter
from metasoft_patches.hooks.install import verify_hooks
from metasoft_patches.http.app import INNER_APP_PATH, add_middleware

load_plugins()
app = import_from_string(os.environ[INNER_APP_PATH])
add_middleware(app)
try:
    verify_hooks(load_adapter().targets_of("flags", "frontend"))
except RuntimeError as error:
    # The one error after which uvicorn ends the server; after others it starts the worker again and again.
    raise ImportFromStringError(str(error)) from error
