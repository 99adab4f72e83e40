"""The CPU platform: where it stays out, and which cores it gives to whom."""

import os

import pytest


def test_the_cpu_platform_stays_out_where_it_is_not_wanted(monkeypatch):
    from metasoft_patches import cpu as cpu_platform

    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    assert cpu_platform.activate() is None
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE")
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    assert cpu_platform.activate() is None


@pytest.mark.parametrize(
    ("cores", "ranks", "expected"),
    [([0, 1], 3, "0|1|0"), ([0, 1], 2, "0|1"), ([0, 1, 2, 3], 2, "0,1|2,3"), ([4, 6, 7], 2, "4|6")],
)
def test_more_ranks_than_numa_nodes_share_the_cores(cores, ranks, expected):
    import sglang.srt.plugins  # noqa: F401  (as a server does, first)
    from metasoft_patches.cpu.platform import spread_cores

    assert spread_cores(cores, ranks) == expected


def test_a_second_engine_in_a_process_gets_a_binding_of_its_own(monkeypatch):
    import sglang.srt.plugins  # noqa: F401  (as a server does, first)
    from metasoft_patches.cpu.platform import THREAD_BINDING, TorchCpuPlatform, spread_cores

    cores = sorted(os.sched_getaffinity(0))
    monkeypatch.delenv(THREAD_BINDING, raising=False)
    platform = TorchCpuPlatform()
    for ranks, expected in ((3, spread_cores(cores, 3)), (1, None), (2, spread_cores(cores, 2))):
        platform.bind_threads(ranks)
        assert os.environ.get(THREAD_BINDING) == expected
    monkeypatch.setenv(THREAD_BINDING, "0|0|0")  # the user's own is left alone
    platform.bind_threads(1)
    assert os.environ[THREAD_BINDING] == "0|0|0"
