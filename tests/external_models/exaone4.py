"""SGLang's EXAONE 4 under another name: under its own SGLang asks for an attention backend that needs a GPU."""

from sglang.srt.models.exaone4 import Exaone4ForCausalLM


class Exaone4OnAnyBackend(Exaone4ForCausalLM):
    """The same."""


EntryClass = Exaone4OnAnyBackend
