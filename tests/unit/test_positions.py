"""The position offset of every row, on SGLang's own batches; and what decode graphs rely on: a tensor of its own."""

from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("sglang")
from metasoft_patches.adapter import load_adapter
from metasoft_patches.scheduler.positions import PositionShift
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.model_executor import forward_batch_info
from sglang.srt.model_executor.cuda_graph_buffer_registry import build_decode_registry
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch, ForwardMode
from sglang.srt.runtime_context import get_parallel
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from sglang_metasoft.config import MetaSoftConfig
from tests.unit.sglang_requests import make_prefix, make_request

if version("sglang") == "0.5.17":
    pytest.skip("SGLang 0.5.17 wants a whole model runner to make a ForwardBatch", allow_module_level=True)

# What ForwardBatch.init_new asks of a model runner, for a plain text model on a CPU.
RUNNER = SimpleNamespace(
    device="cpu",
    is_draft_worker=False,
    lora_manager=None,
    model_config=SimpleNamespace(model_is_mrope=False, requires_mm_token_modalities=False),
    ngram_embedding_manager=SimpleNamespace(enabled=False),
    kv_index_translator=SimpleNamespace(own_plan=lambda batch: SimpleNamespace(bind=lambda *args, **kwargs: None)),
    prefill_attention_backend_str="torch_native",
)


def make_batch(mode: ForwardMode, offsets: list[int | None], rows: list[int], **fields) -> ScheduleBatch:
    """A batch of requests whose rows have these lengths.

    Args:
        offsets: how much shorter a request's prefix is than what it stands for; None: not known to MetaSoft.
    """
    reqs = [make_request(5000) for _ in offsets]
    for req, offset in zip(reqs, offsets, strict=True):
        if offset is None:
            del req.metasoft
        elif offset:
            req.metasoft.use_prefix(req, make_prefix(offset + 100, 100))
    lengths = torch.tensor(rows)
    return ScheduleBatch(
        reqs=reqs, forward_mode=mode, device="cpu", spec_algorithm=SpeculativeAlgorithm.NONE,
        req_pool_indices=torch.arange(len(rows)), req_pool_indices_cpu=torch.arange(len(rows)),
        seq_lens=lengths, seq_lens_cpu=lengths.clone(), orig_seq_lens=lengths.clone(), **fields,
    )  # fmt: skip


def make_forward_batch(batch: ScheduleBatch, runner=RUNNER) -> ForwardBatch:
    """What SGLang makes of a batch."""
    with get_parallel().override(moe_ep_size=1, attn_dcp_size=1):
        return ForwardBatch.init_new(
            batch, runner, capture_hidden_mode=CaptureHiddenMode.NULL, return_hidden_states_before_norm=False
        )


def launch(batch: ScheduleBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions that SGLang gives the batch's tokens, and those after the hook."""
    forward_batch = make_forward_batch(batch)
    before = forward_batch.positions
    adapter = load_adapter()
    hooks = adapter.hooks.SchedulerHooks(MetaSoftConfig(), adapter)
    hooks.shift_positions(forward_batch, ForwardBatch, batch, RUNNER)
    return before, forward_batch.positions


def test_a_decode_step_gets_a_new_tensor_of_the_same_kind():
    before, shifted = launch(make_batch(ForwardMode.DECODE, [1500, 0, None], [501, 8, 91]))
    assert before.tolist() == [500, 7, 90] and shifted.tolist() == [2000, 7, 90]
    assert shifted.dtype == before.dtype and shifted.data_ptr() != before.data_ptr()


def test_without_a_compressed_request_the_very_tensor_stays():
    """So that a graph runner that filled its buffer ahead need not copy again."""
    before, shifted = launch(make_batch(ForwardMode.DECODE, [0, None], [4, 5]))
    assert shifted is before


@pytest.mark.parametrize("mode", [ForwardMode.EXTEND, ForwardMode.MIXED])
def test_prefill_and_mixed_batches_shift_every_token_of_a_request(mode):
    batch = make_batch(
        mode, [100, 30, 0], [13, 71, 7], prefix_lens=[10, 70, 5], extend_lens=[3, 1, 2], extend_num_tokens=6,
        extend_logprob_start_lens=[3, 1, 2],
    )  # fmt: skip
    before, shifted = launch(batch)
    assert before.tolist() == [10, 11, 12, 70, 5, 6]
    assert shifted.tolist() == [110, 111, 112, 100, 5, 6]


@pytest.mark.parametrize("leader_offset", [0, 40])
def test_beams_ride_behind_the_requests_with_the_offset_of_their_own(leader_offset):
    """Two groups, of two and of three beams; today's leaders are not compressed, but the rows would be right."""
    from sglang.srt.beam_search.batch_tail import append_beam_tail, strip_beam_tail
    from sglang.srt.beam_search.beam_group import BeamGroup

    batch = make_batch(ForwardMode.DECODE, [leader_offset, 1200, None], [51, 501, 91])
    for index, width in ((0, 2), (2, 3)):
        group = batch.reqs[index].beam_group = BeamGroup(beam_width=width, max_new_tokens=8)
        group.member_rows = group.member_rows_cpu = torch.arange(10, 9 + width)
    append_beam_tail(batch)
    before, shifted = launch(batch)
    assert before.tolist() == [50, 500, 90, 50, 90, 90]
    assert shifted.tolist() == [50 + leader_offset, 1700, 90, 50 + leader_offset, 90, 90]
    strip_beam_tail(batch)
    assert launch(batch)[1].tolist() == [50 + leader_offset, 1700, 90]


@pytest.mark.parametrize("mode", [ForwardMode.TARGET_VERIFY, ForwardMode.DECODE])
def test_every_draft_of_a_request_has_the_offset_of_the_request(mode):
    """A verified tree and a drafted step bring several positions a request, in request order, of their own making."""
    tree = SimpleNamespace(positions=torch.tensor([7, 8, 8, 90, 91, 91]), num_tokens_per_req=3)
    # extend_lens is what the last prefill left.
    batch = make_batch(mode, [1500, 0], [7, 90], extend_lens=[40, 2], spec_info=tree)
    forward_batch = SimpleNamespace(positions=tree.positions, mrope_positions=None)
    adapter = load_adapter()
    hooks = adapter.hooks.SchedulerHooks(MetaSoftConfig(), adapter)
    hooks.shift_positions(forward_batch, ForwardBatch, batch, RUNNER)
    assert forward_batch.positions.tolist() == [1507, 1508, 1508, 90, 91, 91]


def test_while_nothing_changes_a_decode_step_moves_nothing_to_the_device(monkeypatch):
    from metasoft_patches.scheduler import positions

    moved, to_device = [], positions.to_device
    monkeypatch.setattr(positions, "to_device", lambda *args: moved.append(args) or to_device(*args))
    adapter = load_adapter()
    shift = positions.PositionShift(adapter)

    def step(batch, *given) -> list[int]:
        forward_batch = SimpleNamespace(positions=torch.tensor(given), mrope_positions=None)
        shift.apply(forward_batch, batch)
        return forward_batch.positions.tolist()

    batch = make_batch(ForwardMode.DECODE, [1500, 0], [501, 8])
    assert [step(batch, 500 + n, 7 + n) for n in range(3)] == [[2000 + n, 7 + n] for n in range(3)] and len(moved) == 1
    batch.reqs[1].metasoft.use_prefix(batch.reqs[1], make_prefix(300, 100))  # what came after it was compressed
    assert step(batch, 503, 10) == [2003, 210] and len(moved) == 2
    batch.reqs.pop(0)
    assert step(batch, 11) == [211] and len(moved) == 3
    batch.reqs.append(make_batch(ForwardMode.DECODE, [1500], [501]).reqs[0])
    assert step(batch, 12, 504) == [212, 2004] and len(moved) == 4


MROPE_MODEL = SimpleNamespace(model_is_mrope=True, requires_mm_token_modalities=False)
MROPE_RUNNER = SimpleNamespace(**vars(RUNNER) | {"model_config": MROPE_MODEL})


def image(*positions: int, delta: int) -> SimpleNamespace:
    """What SGLang holds of a prompt with an image: three positions a token; here the rows are 0, 1 and 2 up."""
    rows = torch.tensor([positions] * 3) + torch.arange(3)[:, None]
    return SimpleNamespace(
        mrope_positions=rows, mrope_position_delta=torch.tensor([[delta]]), mrope_position_delta_repeated_cache=None
    )


def rows_of_positions(batch: ScheduleBatch, images: list) -> tuple[ForwardBatch, torch.Tensor]:
    """A model's with M-RoPE after the hook, ``[3, n]``, and those before it."""
    batch.multimodal_inputs = images
    settings = SimpleNamespace(deterministic=SimpleNamespace(rl_on_policy_target=None))
    with pytest.MonkeyPatch.context() as patch:  # a process that serves has published its own
        patch.setattr(forward_batch_info, "get_exec", lambda: settings)
        forward_batch = make_forward_batch(batch, MROPE_RUNNER)
    before = forward_batch.mrope_positions
    PositionShift(load_adapter()).apply(forward_batch, batch)
    return forward_batch, before


@pytest.mark.parametrize("mode", [ForwardMode.EXTEND, ForwardMode.MIXED])
def test_all_three_positions_of_an_extend_are_shifted_and_an_images_are_its_own(mode):
    batch = make_batch(
        mode, [100, 30, 0], [13, 71, 7], prefix_lens=[10, 70, 5], extend_lens=[3, 1, 2], extend_num_tokens=6,
        extend_logprob_start_lens=[3, 1, 2],
    )  # fmt: skip
    shifted, before = rows_of_positions(batch, [None, None, image(*range(40, 47), delta=-2)])
    assert before[:, :4].tolist() == [[10, 11, 12, 70]] * 3
    assert shifted.mrope_positions.tolist() == [[110, 111, 112, 100, 45 + row, 46 + row] for row in range(3)]


def test_all_three_positions_of_a_decode_step_are_shifted_and_a_graph_reads_them():
    """What a decode graph reads lies in a buffer of its own, filled by SGLang's registry from the batch."""
    shifted, before = rows_of_positions(
        make_batch(ForwardMode.DECODE, [1500, 0, None], [501, 8, 91]), [None, image(*range(5), delta=-3), None]
    )
    assert before.tolist() == [[500, 4, 90]] * 3 and shifted.mrope_positions.data_ptr() != before.data_ptr()
    registry = build_decode_registry(
        device=torch.device("cpu"), max_bs=4, max_num_token=4, seq_len_fill_value=1, cache_loc_dtype=torch.int64,
        register_global_num_tokens=False, share_pool=False,
    )  # fmt: skip
    shifted.input_ids = shifted.out_cache_loc = torch.zeros(3, dtype=torch.int64)
    registry.fill_from(shifted, raw_bs=3, padded_bs=4, raw_num_tokens=3, padded_num_tokens=4)
    assert registry.get_slot("mrope_positions").slice_for(4, 4).tolist() == [[2000, 4, 90, 0]] * 3
    assert registry.get_slot("positions").slice_for(4, 4).tolist() == [2000, 7, 90, 0]


def test_without_a_compressed_request_the_very_rows_stay():
    shifted, before = rows_of_positions(make_batch(ForwardMode.DECODE, [0, None], [4, 5]), [None, None])
    assert shifted.mrope_positions is before and before.tolist() == [[3, 4]] * 3
