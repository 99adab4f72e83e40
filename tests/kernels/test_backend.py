"""The switch: which tensors get which implementation."""

import pytest
import torch
from metasoft_kernels import backend

from sglang_metasoft.config import KERNELS

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_the_setting_and_the_kernels_agree_on_names():
    assert backend.KERNELS == KERNELS


def test_auto_is_fused_on_cuda_alone():
    assert backend.uses_triton("auto", CUDA, torch.bfloat16) and not backend.uses_triton("auto", CPU, torch.bfloat16)
    assert not backend.uses_triton("torch", CUDA, torch.bfloat16)


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setattr(backend, "is_interpreted", lambda: False)
    with pytest.raises(ValueError, match="'triton' is not allowed on the device 'cpu' unless TRITON_INTERPRET=1"):
        backend.uses_triton("triton", CPU, torch.float32)
    monkeypatch.setattr(backend, "is_interpreted", lambda: True)
    assert backend.uses_triton("triton", CPU, torch.float32)


def test_a_gpu_without_the_type_takes_torch(monkeypatch):
    monkeypatch.setattr(backend, "is_interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert not backend.uses_triton("auto", CUDA, torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="compute capability 8.0, which lacks that type"):
        backend.uses_triton("triton", CUDA, torch.float8_e4m3fn)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert backend.uses_triton("auto", CUDA, torch.float8_e4m3fn)
