"""The plugin that ties MetaSoft into SGLang; entry point ``sglang.srt.plugins``."""


def register() -> None:
    """Called by SGLang in every process. Adds flags and checks; the scheduler stays as it is without the flag."""
    from metasoft_patches import frontend
    from metasoft_patches.install import register_hooks

    register_hooks("frontend", lambda name: getattr(frontend, name))
    frontend.extend_engine()
