"""Where SGLang is hooked, how that is done and how it is checked."""
