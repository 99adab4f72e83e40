"""``sglang-metasoft inspect``: what compression does to one prompt, as a web page."""
