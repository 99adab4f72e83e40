"""The probe: one extra extend of a few tokens per prompt, through the served model's own decoder body.

An attention backend of our own answers each layer's attention call for the probe tokens and consolidates that layer's
entries on the way. The real backend, its plans and its CUDA graphs are not touched, and nothing is sampled.
"""

from collections.abc import Callable

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch, ForwardMode
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from metasoft_patches.adapter import Adapter
from metasoft_patches.forward import lora
from metasoft_patches.forward.body import Body, attention_modules
from metasoft_patches.forward.layers import window_of
from metasoft_patches.transfer import to_device
from sglang_metasoft.types import Job, LayerPool

# (number of the layer among the attention layers, SGLang's RadixAttention, q, k, v, the layer's pool) -> output
CompressLayer = Callable[[int, RadixAttention, torch.Tensor, torch.Tensor, torch.Tensor, LayerPool], torch.Tensor]


class ProbeBackend(AttentionBackend):
    """Attention of the probe tokens; ``compress_layer`` gets q, k, v of all jobs in turn and returns their output."""

    def __init__(
        self, model, req_to_token_pool, token_to_kv_pool, jobs: list[Job], compress_layer: CompressLayer
    ) -> None:
        self.numbers = {id(layer): number for number, layer in enumerate(attention_modules(model))}
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
            window_tokens=window_of(layer),
        )

    def forward(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        if unknown := [name for name, value in kwargs.items() if value is not None]:
            raise ValueError(f"metasoft: an attention layer takes {unknown}, which a probe does not know")
        out = self.compress_layer(
            self.numbers[id(layer)],
            layer,
            q.view(-1, layer.tp_q_head_num, layer.qk_head_dim),
            k.view(-1, layer.tp_k_head_num, layer.qk_head_dim),
            v.view(-1, layer.tp_v_head_num, layer.v_head_dim),
            self.layer_pool(layer),
        )
        return out.reshape(-1, layer.tp_q_head_num * layer.v_head_dim)  # some models have a row a head in q


def visit_layers(model_runner, backend: ProbeBackend) -> None:
    """Do what belongs to each layer without probe tokens: the model does not run."""
    for number, layer in enumerate(attention_modules(model_runner.model)):
        heads = layer.tp_q_head_num, layer.tp_k_head_num, layer.tp_v_head_num
        q, k, v = (
            torch.empty(0, count, layer.head_dim, dtype=model_runner.dtype, device=model_runner.device)
            for count in heads
        )
        backend.compress_layer(number, layer, q, k, v, backend.layer_pool(layer))


def run_probe(
    model_runner,
    body: Body,
    backend: ProbeBackend,
    req_pool_indices: torch.Tensor,
    adapter: Adapter,
    wants_logits: bool = False,
) -> torch.Tensor:
    """Run the probes of all jobs through the decoder body, layer by layer, as one batch.

    Args:
        model_runner: SGLang's, for the device.
        body: of its model.
        backend: holds the jobs; called once per layer.
        req_pool_indices: ``[jobs]`` rows of the requests, on the device.
        adapter: of this SGLang.
        wants_logits: run the model's head as well.

    Returns:
        ``[jobs, V]`` logits after each job's last token, or ``[tokens, D]`` hidden states after the last layer.
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
    # Slot 0 is SGLang's padding slot: models that write K and V outside the backend write there.
    nowhere = torch.zeros(total, dtype=torch.int64, device=device)
    input_ids = torch.zeros(total, dtype=torch.int64, device=device)
    context_slots = [probe.context_slots for probe in probes]
    batch = extend_batch(model_runner, input_ids, positions, req_pool_indices, nowhere, context_slots, lengths)
    embeds = torch.cat([probe.embeds for probe in probes]).to(model_runner.dtype)
    lora_ids = [job.lora_id for job in backend.jobs]
    run = body.logits if wants_logits else body.hidden_states
    with (
        torch.no_grad(),
        lora.routing(model_runner, batch, lora_ids),
        adapter.forward_scope(model_runner.model, backend, batch),
    ):
        return run(input_ids, positions, batch, embeds)


def extend_batch(
    model_runner,
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    req_pool_indices: torch.Tensor,
    out_cache_loc: torch.Tensor,
    prefix_lens: list[int],
    lengths: list[int],
) -> ForwardBatch:
    """A prefill of a few tokens for each request.

    Args:
        model_runner: SGLang's, which knows whether the model has M-RoPE: a text's three positions are the same.
        input_ids, positions: ``[tokens]`` int64.
        req_pool_indices: ``[requests]`` rows of the requests.
        out_cache_loc: ``[tokens]`` int64, where their K and V go.
        prefix_lens, lengths: of each request, entries before and tokens now.
    """
    device = input_ids.device
    seq_lens_cpu = torch.tensor([a + b for a, b in zip(prefix_lens, lengths, strict=True)])
    return ForwardBatch(
        forward_mode=ForwardMode.EXTEND,
        batch_size=len(lengths),
        input_ids=input_ids,
        req_pool_indices=req_pool_indices,
        seq_lens=to_device(seq_lens_cpu, torch.int64, device),
        out_cache_loc=out_cache_loc,
        seq_lens_sum=int(seq_lens_cpu.sum()),
        seq_lens_cpu=seq_lens_cpu,
        positions=positions,
        mrope_positions=positions.repeat(3, 1) if model_runner.model_config.model_is_mrope else None,
        spec_algorithm=SpeculativeAlgorithm.NONE,
        capture_hidden_mode=CaptureHiddenMode.NULL,
        extend_num_tokens=len(input_ids),
        extend_seq_lens=to_device(lengths, torch.int32, device),
        extend_prefix_lens=to_device(prefix_lens, torch.int32, device),
        extend_seq_lens_cpu=lengths,
        extend_prefix_lens_cpu=prefix_lens,
    )
