"""``sglang-metasoft bench``: plain SGLang against the same server with compression, in one run, with equal pools."""
