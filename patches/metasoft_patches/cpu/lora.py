"""SGLang's LoRA on a machine without an accelerator: its page-locked host memory, which torch cannot give there."""

import functools

import torch
from sglang.srt.lora.lora_manager import LoRAManager
from torch.overrides import TorchFunctionMode

# Where LoRA code allocates: its construction, loading, and what precedes each forward. The forward itself does not.
ALLOCATING = ("__init__", "load_lora_adapter", "load_lora_adapter_from_tensors", "prepare_lora_batch")


class PageableMemory(TorchFunctionMode):
    """Within it, host memory that is asked for page-locked is ordinary memory."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.pin_memory:
            return args[0]
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return func(*args, **kwargs)


def allow_pageable_memory() -> None:
    """Let this process's LoRA manager work without page-locked memory."""
    for name in ALLOCATING:
        setattr(LoRAManager, name, _pageable(getattr(LoRAManager, name)))


def _pageable(original):
    @functools.wraps(original)
    def call(*args, **kwargs):
        with PageableMemory():
            return original(*args, **kwargs)

    return call
