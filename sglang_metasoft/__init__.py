"""Meta-Soft KV-cache compression for SGLang, with prefix sharing of compressed prompts."""

from sglang_metasoft.version import __version__

__all__ = ["__version__"]
