"""The runner of the stages: which prompts share a probe, what it says of its memory, and when it warms up."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("sglang")
from metasoft_patches.forward import probe
from metasoft_patches.forward import runner as module
from metasoft_patches.forward.kernels import Kernels
from metasoft_patches.forward.runner import ProbeRunner

from sglang_metasoft.pipeline.memory import WORKSPACE_BYTES
from sglang_metasoft.types import Job, ModelShape, Plan, Probe


def make_runner(device: str = "cuda", attend=print, before_tokens=(-1,)) -> ProbeRunner:
    runner = ProbeRunner.__new__(ProbeRunner)
    runner.shape, runner.size = ModelShape("Llama-3.1-8B", 1, 4096, 32, 32, 8, 128), 1
    runner.kernels = Kernels(attend, "", WORKSPACE_BYTES if attend else 0)
    runner.device, runner.method = torch.device(device), None
    common = dict(layer_id=0, tp_q_head_num=32, scaling=0.1, k_scale_float=None, v_scale_float=None)
    layers = [SimpleNamespace(sliding_window_size=before, **common) for before in before_tokens]
    runner.runner = SimpleNamespace(model=layers, dtype=torch.bfloat16)
    pool = SimpleNamespace(get_key_buffer=lambda layer: "keys", get_value_buffer=lambda layer: "values")
    runner.committer = SimpleNamespace(req_to_token_pool=None, pool=pool)
    return runner


def make_job(tokens: int) -> Job:
    slots = torch.empty(0)
    return Job(Plan(0, tokens, tokens // 4, 4), Probe(torch.empty(32, 1), tokens, tokens), slots, slots, slots)


def test_prompts_share_a_probe_as_long_as_the_workspace_holds_them():
    runner = make_runner()

    def together(*tokens):
        return [part.stop - part.start for part in runner._together([make_job(number) for number in tokens])]

    assert together(32_768) == [1] and together(*[32_768] * 16) == [16]
    assert together(*[1_000_000] * 4) == [1] * 4  # more than a head at a time of two
    parts = together(*[4096] * 200)
    assert len(parts) > 1 and sum(parts) == 200 and parts[0] >= 30
    runner.kernels = Kernels(None, "torch")
    assert together(*[1_000_000] * 4) == [4]  # job by job in any case


def test_the_start_up_line_names_the_memory():
    assert make_runner().memory == "workspace at most 64 MiB and 128 bytes a token"
    assert make_runner(attend=None).memory == "workspace not bounded"


def test_layers_of_each_window_are_warmed_up(monkeypatch, caplog):
    """Models may begin with one, and have the others only later."""
    asked = []
    for user in (module, probe):
        monkeypatch.setattr(user, "attention_modules", lambda model: model)
    monkeypatch.setattr(module, "warm_up", lambda *args: asked.append(args[2].window_tokens) or 1.5)
    with caplog.at_level("INFO"):
        make_runner(before_tokens=(511, 511, -1, 511, -1)).warm_up()
    assert sorted(asked, key=str) == [512, None] and "workspace taken in 3.0 s" in caplog.text


@pytest.mark.parametrize(("device", "attend", "warms_up"), [("cuda", print, 1), ("cpu", print, 0), ("cuda", None, 0)])
def test_kernels_are_compiled_on_a_gpu_alone(device, attend, warms_up, monkeypatch, caplog):
    asked = []
    for user in (module, probe):
        monkeypatch.setattr(user, "attention_modules", lambda model: model)
    monkeypatch.setattr(module, "warm_up", lambda *args: asked.append(args) or 12.34)
    with caplog.at_level("INFO"):
        make_runner(device, attend).warm_up()
    assert len(asked) == warms_up == caplog.text.count("kernels compiled and workspace taken in 12.3 s")
    if asked:
        _, given, pool, heads, dtype = asked[0]
        assert (given, pool.key, pool.value, heads, dtype) == (print, "keys", "values", 32, torch.bfloat16)


def test_a_warm_up_that_fails_is_said_and_the_server_starts(monkeypatch, caplog):
    def fail(*args):
        raise torch.OutOfMemoryError("tried to allocate 64 MiB")

    for user in (module, probe):
        monkeypatch.setattr(user, "attention_modules", lambda model: model)
    monkeypatch.setattr(module, "warm_up", fail)
    make_runner().warm_up()
    assert "could not be compiled before the first prompt" in caplog.text and "tried to allocate" in caplog.text
