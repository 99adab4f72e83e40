"""The served model: its shape as a compressor knows it, and whether it can be served at all."""

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from sglang_metasoft.hf.shape import shape_of
from sglang_metasoft.types import AttentionLayer, ModelShape


def model_shape(model_config) -> ModelShape:
    """The served model, as a compressor knows it; SGLang knows under which name each configuration counts KV heads."""
    shape = shape_of(model_config.hf_text_config, str(model_config.model_path))
    return shape._replace(num_kv_heads=model_config.get_total_num_kv_heads())


def check_pool(pool) -> None:
    """Refuse a KV pool that entries cannot be rewritten in.

    Raises:
        ValueError: one sentence with what was found and what is supported.
    """
    layout = getattr(pool, "kv_cache_layout", None)  # which only pools of keys and values have
    if type(pool) is not MHATokenToKVPool or pool.use_hnd or layout not in (None, "nhd"):
        raise ValueError(
            f"--enable-metasoft: KV pool {type(pool).__name__} (layout {layout}) is not supported; "
            "supported: MHATokenToKVPool in its default layout"
        )


def check_layers(model: torch.nn.Module, layers: list[AttentionLayer], shape: ModelShape, tp_size: int) -> None:
    """Refuse a model that compression cannot serve.

    Args:
        model: the loaded model.
        layers: of it.
        shape: of the whole model; ``tp_size`` ranks share its heads.

    Raises:
        ValueError: one sentence with the layers and what they do.
    """
    name = f"--enable-metasoft: model class {type(model).__name__} is not supported"
    for number, layer in enumerate(layers):
        if layer.peculiarity is not None:
            alike = [other for other, found in enumerate(layers) if found.peculiarity == layer.peculiarity]
            raise ValueError(f"{name}: attention layer {number} {layer.peculiarity}, as do {len(alike)} of its layers")
    if len(layers) != shape.num_layers:
        raise ValueError(f"{name}: {len(layers)} attention layers found, {shape.num_layers} expected")
    expected = shape.num_heads // tp_size, max(shape.num_kv_heads // tp_size, 1), shape.head_dim
    for number, layer in enumerate(layers):
        found = layer.num_heads, layer.num_kv_heads, layer.head_dim
        if found != expected:
            raise ValueError(
                f"{name}: attention layer {number} has {found[0]} query and {found[1]} KV heads of size {found[2]} a "
                f"rank; its configuration says {expected[0]}, {expected[1]} and {expected[2]}"
            )
