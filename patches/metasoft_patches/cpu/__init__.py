"""An SGLang platform for machines without an accelerator, so that laptops and CI run the real server.

Registered under the entry-point group ``sglang.srt.platforms``; it activates only where torch sees
no accelerator and the user has not asked for SGLang's own CPU engine (``SGLANG_USE_CPU_ENGINE=1``).
"""

import os

import torch

from metasoft_patches.adapter import folder_of
from metasoft_patches.compat import check_sglang_version

# What the platform fills in where the user says nothing: a KV pool that fits a laptop.
DEFAULT_POOL_TOKENS = 65_536
DEFAULT_MEMORY_FRACTION = 0.5  # of the machine, weights and pool together


def activate() -> str | None:
    """Return the platform's path where no accelerator exists, else None (SGLang then picks its own).

    Raises:
        ValueError: this SGLang is not supported; SGLang logs it and picks its own platform.
    """
    if torch.accelerator.is_available() or os.getenv("SGLANG_USE_CPU_ENGINE", "0") == "1":
        return None
    # Imported by SGLang only when it is chosen: the class needs SGLang's platform package.
    return f"metasoft_patches.{folder_of(check_sglang_version())}.cpu_platform.CpuPlatform"


def offer_attention_backend() -> None:
    """Let ``--attention-backend`` name this platform's own backend where the platform is the chosen one."""
    from sglang.srt.platforms import current_platform
    from sglang.srt.server_args import ATTENTION_BACKEND_CHOICES, add_attention_backend_choices

    backend = getattr(current_platform, "attention_backend", None)
    if backend is not None and backend not in ATTENTION_BACKEND_CHOICES:
        add_attention_backend_choices([backend])
