"""Fresh memory holds NaN in every kernel test."""

import pytest

from tests.kernels.cases import nan_memory


@pytest.fixture(autouse=True)
def fresh_memory_is_nan(monkeypatch):
    nan_memory(monkeypatch)
