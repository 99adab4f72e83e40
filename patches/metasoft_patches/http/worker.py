"""The HTTP application of a server with several tokenizer workers; each of them imports it in a process of its own."""

import os

from sglang.srt.plugins import load_plugins
from uvicorn.importer import import_from_string

from metasoft_patches.http.app import INNER_APP_PATH, add_middleware

load_plugins()
app = import_from_string(os.environ[INNER_APP_PATH])
add_middleware(app)
