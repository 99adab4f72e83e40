"""A record of each attention layer, read from the loaded model: what it attends to, its heads, what may turn it."""

import torch
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention

from metasoft_patches.forward.body import attention_modules
from sglang_metasoft.types import AttentionLayer, LayerKind, Rope

SINKS = ("sinks", "sink", "attention_sink_bias")  # names of such a parameter beside the attention


def read_layers(model: torch.nn.Module) -> list[AttentionLayer]:
    """All layers in order; how their queries are turned is seen by the self-test."""
    owners = {id(child): module for module in model.modules() for child in module.children()}
    return [_read_layer(layer, owners[id(layer)]) for layer in attention_modules(model)]


def _read_layer(layer: RadixAttention, owner: torch.nn.Module) -> AttentionLayer:
    window = window_of(layer)
    kind = LayerKind.FULL if window is None else LayerKind.WINDOW
    if layer.attn_type != AttentionType.DECODER or layer.is_cross_attention or layer.xai_temperature_len > 0:
        kind = LayerKind.OTHER
    return AttentionLayer(
        kind,
        num_heads=layer.tp_q_head_num,
        num_kv_heads=layer.tp_k_head_num,
        head_dim=layer.qk_head_dim,
        value_dim=layer.v_head_dim,
        window_tokens=window,
        soft_cap=layer.logit_cap or 0.0,
        has_sinks=any(isinstance(getattr(owner, name, None), torch.Tensor) for name in SINKS),
    )


def window_of(layer: RadixAttention) -> int | None:
    """Tokens that one of the layer sees, itself included; None: all before it. SGLang counts those before it."""
    return layer.sliding_window_size + 1 if layer.sliding_window_size > 0 else None


def find_ropes(model: torch.nn.Module, positions: int) -> list[Rope]:
    """The rotary embeddings of a model's layers, each once; what has no table gets one of so many positions."""
    found: list[Rope] = []
    for module in {id(module): module for module in model.modules()}.values():
        if isinstance(getattr(module, "cos_sin_cache", None), torch.Tensor) and hasattr(module, "is_neox_style"):
            found.append(Rope(module.cos_sin_cache, module.is_neox_style))
        elif isinstance(getattr(module, "long_cos_sin_cache", None), torch.Tensor):
            # Up to the end of the short table a prompt is turned by that one, beyond by the other.
            short, long = module.short_cos_sin_cache, module.long_cos_sin_cache
            found.append(Rope(torch.cat([short, long[len(short) :]]), True))
        elif isinstance(frequencies := getattr(module, "inv_freq", None), torch.Tensor) and frequencies.dim() == 1:
            angles = torch.arange(positions, device=frequencies.device)[:, None] * frequencies.float()
            table = torch.cat([angles.cos(), angles.sin()], -1) * getattr(module, "attention_scaling", 1.0)
            found.append(Rope(table, True))
    return [rope for rope in found if rope.cos_sin.dim() == 2]
