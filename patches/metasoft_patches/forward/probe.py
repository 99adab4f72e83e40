"""The probe: one extra extend of a few tokens per prompt, through the served model's own decoder body.

An attention backend of our own answers each layer's attention call for the probe tokens and consolidates that layer's
entries on the way. The real backend, its plans and its CUDA graphs are not touched, and nothing is sampled.
"""

from collections.abc import Callable

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch, ForwardMode
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from metasoft_patches.adapter import Adapter
from metasoft_patches.forward import lora
from metasoft_patches.forward.model import attention_layers
from metasoft_patches.transfer import to_device
from sglang_metasoft.types import Job, LayerPool

CompressLayer = Callable[[object, torch.Tensor, torch.Tensor, torch.Tensor, LayerPool], torch.Tensor]


class ProbeBackend(AttentionBackend):
    """Attention of the probe tokens; ``compress_layer`` gets q, k, v of all jobs in turn and returns their output."""

    def __init__(self, req_to_token_pool, token_to_kv_pool, jobs: list[Job], compress_layer: CompressLayer) -> None:
        # Model code resolves the pools through the active backend.
        self.req_to_token_pool = req_to_token_pool
        self.token_to_kv_pool = token_to_kv_pool
        self.jobs = jobs
        self.lengths = [job.probe.embeds.shape[0] for job in jobs]
        self.compress_layer = compress_layer

    def init_forward_metadata(self, forward_batch) -> None:
        """Nothing to plan."""

    def layer_pool(self, layer) -> LayerPool:
        """The pool's buffers of one layer."""
        return LayerPool(
            key=self.token_to_kv_pool.get_key_buffer(layer.layer_id),
            value=self.token_to_kv_pool.get_value_buffer(layer.layer_id),
            scale=layer.scaling,
            key_scale=layer.k_scale_float or 1.0,
            value_scale=layer.v_scale_float or 1.0,
        )

    def forward(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        out = self.compress_layer(
            layer,
            q.view(-1, layer.tp_q_head_num, layer.qk_head_dim),
            k.view(-1, layer.tp_k_head_num, layer.qk_head_dim),
            v.view(-1, layer.tp_v_head_num, layer.v_head_dim),
            self.layer_pool(layer),
        )
        return out.reshape(q.shape[0], -1)


def visit_layers(model_runner, backend: ProbeBackend) -> None:
    """Do what belongs to each layer without probe tokens: the model does not run."""
    for layer in attention_layers(model_runner.model):
        heads = layer.tp_q_head_num, layer.tp_k_head_num, layer.tp_v_head_num
        q, k, v = (
            torch.empty(0, number, layer.head_dim, dtype=model_runner.dtype, device=model_runner.device)
            for number in heads
        )
        backend.compress_layer(layer, q, k, v, backend.layer_pool(layer))


def run_probe(model_runner, backend: ProbeBackend, req_pool_indices: torch.Tensor, adapter: Adapter) -> None:
    """Run the probes of all jobs through the decoder body, layer by layer, as one batch.

    Args:
        model_runner: SGLang's, for the model and the device.
        backend: holds the jobs; called once per layer.
        req_pool_indices: ``[jobs]`` rows of the requests, on the device.
        adapter: of this SGLang.
    """
    device = model_runner.device
    probes = [job.probe for job in backend.jobs]
    lengths = backend.lengths
    # RoPE tables end at the context length: near it the probe slides back onto the last positions.
    last_start = [model_runner.model_config.context_len - length for length in lengths]
    starts = [max(0, min(probe.first_position, last)) for probe, last in zip(probes, last_start, strict=True)]
    positions = torch.cat(
        [torch.arange(start, start + length, device=device) for start, length in zip(starts, lengths, strict=True)]
    )
    total = sum(lengths)
    prefix_lens = [probe.context_slots for probe in probes]
    seq_lens_cpu = torch.tensor([a + b for a, b in zip(prefix_lens, lengths, strict=True)])
    input_ids = torch.zeros(total, dtype=torch.int64, device=device)
    batch = ForwardBatch(
        forward_mode=ForwardMode.EXTEND,
        batch_size=len(probes),
        input_ids=input_ids,
        req_pool_indices=req_pool_indices,
        seq_lens=to_device(seq_lens_cpu, torch.int64, device),
        # Slot 0 is SGLang's padding slot: models that write K and V outside the backend write there.
        out_cache_loc=torch.zeros(total, dtype=torch.int64, device=device),
        seq_lens_sum=int(seq_lens_cpu.sum()),
        seq_lens_cpu=seq_lens_cpu,
        positions=positions,
        spec_algorithm=SpeculativeAlgorithm.NONE,
        capture_hidden_mode=CaptureHiddenMode.NULL,
        extend_num_tokens=total,
        extend_seq_lens=to_device(lengths, torch.int32, device),
        extend_prefix_lens=to_device(prefix_lens, torch.int32, device),
        extend_seq_lens_cpu=lengths,
        extend_prefix_lens_cpu=prefix_lens,
    )
    embeds = torch.cat([probe.embeds for probe in probes]).to(model_runner.dtype)
    model = model_runner.model
    lora_ids = [job.lora_id for job in backend.jobs]
    with (
        torch.no_grad(),
        lora.routing(model_runner, batch, lora_ids),
        adapter.forward_scope(model, backend, batch),
    ):
        model.model(input_ids, positions, batch, input_embeds=embeds)
