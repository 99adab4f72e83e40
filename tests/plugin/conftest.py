"""Settings are parsed in the tests' own process here; what that leaves in the environment must not reach a server."""

import os

import pytest

THREAD_BINDING = "SGLANG_CPU_OMP_THREADS_BIND"


@pytest.fixture(autouse=True)
def own_thread_binding():
    """Put back the cores of each rank that a parsed ``--tp-size`` shares out."""
    before = os.environ.get(THREAD_BINDING)
    yield
    os.environ.pop(THREAD_BINDING, None)
    if before is not None:
        os.environ[THREAD_BINDING] = before
