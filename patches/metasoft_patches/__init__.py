"""The plugin that ties MetaSoft into SGLang; entry point ``sglang.srt.plugins``."""


def register() -> None:
    """Called by SGLang in every process. Adds flags and checks; the scheduler stays as it is without the flag.

    In a version that is not supported only the flags are added: each of them then says which versions are. So it is in
    a build of a supported version whose source does not fit; there they say what does not.
    """
    from metasoft_patches import cpu as cpu_platform
    from metasoft_patches import frontend
    from metasoft_patches.adapter import load_adapter
    from metasoft_patches.compat import is_sglang_supported, is_sglang_tested
    from metasoft_patches.hooks.contract import broken_targets
    from metasoft_patches.hooks.install import register_hooks
    from metasoft_patches.hooks.targets import FLAG_TARGETS

    register_hooks(FLAG_TARGETS, frontend)
    frontend.extend_engine()
    cpu_platform.offer_attention_backend()
    if is_sglang_supported():
        targets = load_adapter().targets_of("frontend")
        if is_sglang_tested() or not broken_targets(targets):
            from metasoft_patches.http import entry

            register_hooks(targets, frontend, entry, load_adapter().hooks)
