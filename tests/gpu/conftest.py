"""Fixtures of the GPU tests. ``METASOFT_GPU_DRY_RUN=1`` runs them on a CPU, smaller: that checks the checks."""

import os

import pytest
import torch

DRY_RUN = os.environ.get("METASOFT_GPU_DRY_RUN") == "1"
BACKENDS = ["torch_native"] if DRY_RUN else ["flashinfer", "triton"]
PAGES = [16] if DRY_RUN else [1, 16]
POOL_TOKENS = 32_768 if DRY_RUN else 131_072
# On a GPU everything that users have: overlap scheduler and decode CUDA graphs are on by default.
DEVICE_FLAGS = [] if DRY_RUN else ["--mem-fraction-static", "0.4", "--cuda-graph-max-bs", "64"]
DEVICE_FLAGS += ["--sampling-backend", "pytorch", "--grammar-backend", "none"]


def pytest_collection_modifyitems(items) -> None:
    if not torch.cuda.is_available() and not DRY_RUN:
        for item in items:
            if "tests/gpu/" in str(item.path):
                item.add_marker(pytest.mark.skip(reason="no GPU; METASOFT_GPU_DRY_RUN=1 runs it on the CPU"))


@pytest.fixture(scope="session")
def model_dir(full_model_dir):
    return full_model_dir


@pytest.fixture(scope="session")
def long_ids(document_ids) -> list[int]:
    """A text of about 10,000 tokens."""
    return document_ids + document_ids
