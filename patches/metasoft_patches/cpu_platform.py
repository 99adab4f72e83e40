"""An SGLang platform for machines without an accelerator, so that laptops and CI run the real server.

Registered under the entry-point group ``sglang.srt.platforms``; it activates only where torch sees
no accelerator and the user has not asked for SGLang's own CPU engine (``SGLANG_USE_CPU_ENGINE=1``).
"""

import os

import torch


def activate() -> str | None:
    """Return the platform's path where no accelerator exists, else None (SGLang then picks its own)."""
    if torch.accelerator.is_available() or os.getenv("SGLANG_USE_CPU_ENGINE", "0") == "1":
        return None
    # Imported by SGLang only when it is chosen: the class below needs SGLang's platform package.
    return "metasoft_patches.cpu_platform_class.TorchCpuPlatform"
