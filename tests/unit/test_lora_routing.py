"""The LoRA routing of a probe, with SGLang's own manager, default backend and kernels (Triton's interpreter)."""

import contextlib
import os
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("sglang")
from metasoft_patches.cpu.lora import PageableMemory
from metasoft_patches.forward import lora
from metasoft_patches.forward import runner as stages
from metasoft_patches.forward.probe import ProbeBackend, run_probe
from sglang.srt.lora.lora_manager import LoRAManager
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

from sglang_metasoft.consolidations import load_consolidation
from sglang_metasoft.types import Job, Plan, Probe

RANK, WIDTH, PROBE, SLOTS = 16, 32, 32, 3
BATCH = 96  # tokens of the batch before the probe: of these the last 64 are an adapter's


@pytest.fixture(scope="module")
def csgmv():
    """SGLang's default LoRA backend on the CPU."""
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        import sglang.kernels.ops.lora.dense.lora_tuning_config as tuning
        import sglang.srt.lora.backend.chunked_backend as chunked
    finally:
        del os.environ["TRITON_INTERPRET"]
    settings = SimpleNamespace(max_lora_chunk_size=16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "get_device_name", lambda *args: "none")  # no tuned configuration for an interpreter
        patch.setattr(chunked, "get_lora", lambda: settings, raising=False)
        yield chunked.ChunkedSgmvLoRABackend(SLOTS, torch.device("cpu"), server_args=settings)


@pytest.fixture
def manager(csgmv):
    """One whose pool holds the base model and adapters A and B, of which B was last in use."""
    manager = object.__new__(LoRAManager)
    manager.lora_backend, manager.max_loras_per_batch, manager.attn_dp_enabled = csgmv, SLOTS, False
    slots = {None: 0, "A": 1, "B": 2}
    manager.memory_pool = SimpleNamespace(uid_to_buffer_id=slots, get_buffer_id=slots.__getitem__)
    adapter = SimpleNamespace(config=SimpleNamespace(r=RANK), scaling=1.0)
    manager.loras = {"A": adapter, "B": adapter}
    with PageableMemory():
        manager.prepare_lora_batch(extend([32, 64], [None, "B"]))
    return manager


def extend(lengths: list[int], lora_ids: list) -> ForwardBatch:
    nothing = torch.zeros(0, dtype=torch.int64)
    return ForwardBatch(
        forward_mode=ForwardMode.EXTEND, batch_size=len(lengths), input_ids=nothing, req_pool_indices=nothing,
        seq_lens=torch.tensor(lengths), out_cache_loc=nothing, seq_lens_sum=sum(lengths), lora_ids=lora_ids,
        extend_num_tokens=sum(lengths), extend_seq_lens=torch.tensor(lengths, dtype=torch.int32),
        extend_seq_lens_cpu=lengths,
    )  # fmt: skip


class OneLayer:
    """A decoder body of one LoRA projection, whose output is a view into a larger buffer: what is past it is seen.

    The projection adds to each row the number of the adapter's slot, and to a row of the base model nothing.
    """

    def __init__(self, manager) -> None:
        self.backend = manager.lora_backend
        self.buffer = torch.zeros(2 * BATCH, WIDTH)

    def hidden_states(self, input_ids, positions, batch, embeds) -> None:
        rows = len(input_ids)
        down = torch.zeros(2 * BATCH, RANK)
        down[:, 0] = 1  # as if the first projection had given this for every row, the probe's and those past them
        up = torch.arange(float(SLOTS))[:, None, None].expand(SLOTS, WIDTH, RANK).contiguous()
        if self.backend.get_batch_info() is not None:  # the condition of SGLang's layers
            self.backend.run_lora_b_sgemm(down[:rows], up, torch.tensor([0, WIDTH]), base_output=self.buffer[:rows])


def probe(manager, lora_ids: list) -> torch.Tensor:
    """Run probes of 32 rows, one for each id; returns the slots that were applied, in the whole buffer."""
    nothing = torch.zeros(0, dtype=torch.int64)
    rows = Probe(torch.zeros(PROBE, WIDTH), 0, 0)
    jobs = [Job(Plan(0, 0, 0, 0), rows, nothing, nothing, nothing, lora_id) for lora_id in lora_ids]
    layer = OneLayer(manager)
    runner = SimpleNamespace(
        device="cpu", dtype=torch.float32, model=None, lora_manager=manager,
        model_config=SimpleNamespace(context_len=4096, model_is_mrope=False),
    )  # fmt: skip
    adapter = SimpleNamespace(forward_scope=lambda *args: contextlib.nullcontext())
    with PageableMemory():
        backend = ProbeBackend(torch.nn.Module(), None, None, jobs, None)
        run_probe(runner, layer, backend, torch.zeros(len(jobs), dtype=torch.int64), adapter)
    assert (layer.buffer == layer.buffer[:, :1]).all()
    return layer.buffer[:, 0]


@pytest.mark.parametrize("lora_ids", [[None], ["A"], ["B", None, "A"], [None, None], ["A", "A"]])
def test_a_probes_rows_run_under_their_requests_adapters_and_no_other_row_is_written(manager, lora_ids):
    applied = probe(manager, lora_ids)
    slots = [manager.memory_pool.uid_to_buffer_id[lora_id] for lora_id in lora_ids]
    assert applied[: PROBE * len(lora_ids)].view(-1, PROBE).tolist() == [[slot] * PROBE for slot in slots]
    assert not applied[PROBE * len(lora_ids) :].any()


def test_nothing_of_a_probes_routing_is_left(manager):
    probe(manager, ["A"])
    assert manager.lora_backend.get_batch_info() is None  # SGLang's layers then are the base model's


def test_an_adapter_that_is_not_in_the_pool_is_an_error(manager):
    del manager.memory_pool.uid_to_buffer_id["A"]
    with pytest.raises(RuntimeError, match="not in the adapter pool"):
        probe(manager, ["A"])
    del manager.memory_pool.uid_to_buffer_id[None]
    with pytest.raises(RuntimeError, match="not in the adapter pool"):
        probe(manager, [None, "B"])
    assert not probe(manager, [None]).any()  # at calibration the pool may hold adapters alone


def test_the_loads_beside_the_forward_wait_for_the_probe():
    waits = []
    stream = SimpleNamespace(wait_stream=waits.append)
    loader = SimpleNamespace(load_stream=stream, device_module=SimpleNamespace(current_stream=lambda: "forward"))
    lora.hold_back_loads(SimpleNamespace(lora_overlap_loader=loader))
    assert waits == ["forward"]
    lora.hold_back_loads(SimpleNamespace())  # without overlap loading


# -- what a consolidation learns of each adapter's queries -------------------------------------------------------------


class Model:
    def __init__(self, lora_id):
        self.lora_id = lora_id


@pytest.mark.parametrize("name", ["key_bias", "attention_flow"])
def test_each_adapter_has_its_own_consolidation_until_it_is_unloaded(name, monkeypatch):
    asked = []
    consolidation_class = load_consolidation(name)
    if name == "key_bias":
        monkeypatch.setattr(consolidation_class, "prepare", lambda self, model: asked.append(model.lora_id))
    monkeypatch.setattr(stages, "SGLangModel", lambda scheduler, adapter, served, embed, lora_id: Model(lora_id))
    adapters = {"a": None, "b": None}
    runner = stages.ProbeRunner.__new__(stages.ProbeRunner)
    runner.scheduler = runner.adapter = runner.model = None
    runner.runner = SimpleNamespace(lora_manager=SimpleNamespace(loras=adapters))
    runner.method = SimpleNamespace(consolidation=consolidation_class(None, None, None))
    runner.adapter_consolidations = lora.AdapterConsolidations(runner.runner, runner._prepare_for)

    def of(lora_id):
        return runner._consolidation_of(SimpleNamespace(lora_id=lora_id))

    base, a, b = (of(lora_id) for lora_id in (None, "a", "b"))
    assert base is runner.method.consolidation and of("a") is a and of("b") is b
    if name == "attention_flow":
        assert a is b is base  # it learns nothing
        return
    assert len({id(one) for one in (base, a, b)}) == 3 and asked == ["a", "b"]
    del adapters["a"]
    adapters["c"] = None
    of("c")
    assert runner.adapter_consolidations._prepared.keys() == {"b", "c"} and of("b") is b
