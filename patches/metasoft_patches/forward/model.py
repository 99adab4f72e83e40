"""The served model: its shape as a compressor knows it, and whether it can be served at all."""

from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from sglang_metasoft.hf.shape import shape_of
from sglang_metasoft.types import ModelShape


def model_shape(model_config) -> ModelShape:
    """The served model, as a compressor knows it."""
    return shape_of(model_config.hf_text_config, str(model_config.model_path))


def attention_layers(model) -> list[RadixAttention]:
    """The model's attention layers, in order."""
    return [module for module in model.modules() if isinstance(module, RadixAttention)]


def check_model(model, pool, shape: ModelShape) -> None:
    """Refuse a model or a KV pool that compression cannot serve.

    Args:
        model: the loaded model.
        pool: SGLang's token-to-KV pool.

    Raises:
        ValueError: one sentence with what was found and what is supported.
    """
    if type(pool) is not MHATokenToKVPool or pool.use_hnd or pool.kv_cache_layout not in (None, "nhd"):
        raise ValueError(
            f"--enable-metasoft: KV pool {type(pool).__name__} (layout {pool.kv_cache_layout}) is not supported; "
            "supported: MHATokenToKVPool in its default layout"
        )
    if not hasattr(getattr(model, "model", None), "embed_tokens"):
        raise ValueError(f"--enable-metasoft: model class {type(model).__name__} is not supported: no decoder body")
    layers = attention_layers(model)
    unusual = [
        layer.layer_id
        for layer in layers
        if layer.sliding_window_size > 0 or layer.logit_cap or layer.attn_type != AttentionType.DECODER
        or layer.is_cross_attention or layer.v_head_dim != layer.head_dim
    ]  # fmt: skip
    if unusual or len(layers) != shape.num_layers:
        raise ValueError(
            f"--enable-metasoft: model class {type(model).__name__} is not supported: attention layers {unusual} "
            "are not plain causal attention"
            if unusual
            else f"--enable-metasoft: {len(layers)} attention layers found, {shape.num_layers} expected"
        )
