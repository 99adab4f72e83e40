"""What a Hugging Face configuration says of a model, without its weights: the one place that reads it."""

from pathlib import Path

import torch
from transformers import AutoConfig

from sglang_metasoft.config import shown
from sglang_metasoft.types import ModelShape

FULL, SLIDING = "full_attention", "sliding_attention"  # kinds of layers in configurations


def read_config(path: str | Path):
    """The configuration in a folder, or of a hub id.

    Raises:
        ValueError: there is none that transformers knows.
    """
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model path: {shown(str(path))} holds no Hugging Face model: {error}") from None


def read_shape(path: str | Path) -> ModelShape:
    """The model at ``path`` as a compressor knows it, from its configuration alone.

    Raises:
        ValueError: no configuration there, or not one of a decoder with plain attention heads.
    """
    return shape_of(read_config(path).get_text_config(decoder=True), str(path))


def shape_of(text_config, name: str) -> ModelShape:
    """The model as a compressor knows it.

    Args:
        text_config: of the decoder, where a model has several parts.
        name: the model's path.

    Raises:
        ValueError: it is not the configuration of a decoder with plain attention heads.
    """
    try:
        heads, hidden = text_config.num_attention_heads, text_config.hidden_size
        return ModelShape(
            name=name,
            vocab_size=text_config.vocab_size,
            hidden_size=hidden,
            num_layers=text_config.num_hidden_layers,
            num_heads=heads,
            num_kv_heads=getattr(text_config, "num_key_value_heads", None) or heads,
            head_dim=getattr(text_config, "head_dim", None) or hidden // heads,
        )
    except AttributeError as error:
        kind = type(text_config).__name__
        raise ValueError(f"model path: {shown(name)} ({kind}) has no plain attention heads: {error}") from None


def context_tokens(config) -> int | None:
    """The longest text that a model of this configuration takes, if it says so."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


def windows(text_config) -> list[int | None]:
    """Of each layer the tokens that one sees, itself included; None: all before it.

    Raises:
        ValueError: a layer is of another kind.
    """
    kinds = getattr(text_config, "layer_types", None) or [FULL] * text_config.num_hidden_layers
    if unknown := sorted(set(kinds) - {FULL, SLIDING}):
        raise ValueError(f"it has layers of kind {unknown}")
    if FULL not in kinds:
        raise ValueError("no layer sees all tokens, so that there is nothing to choose")
    return [text_config.sliding_window if kind == SLIDING else None for kind in kinds]


def longest_window(config) -> int | None:
    """Tokens of the longest window of a model's layers; None: there is none."""
    text = config.get_text_config(decoder=True)
    has_windows = SLIDING in (getattr(text, "layer_types", None) or ())
    return text.sliding_window if has_windows else None


def kv_bytes_per_entry(shape: ModelShape, dtype: torch.dtype) -> int:
    """Bytes of one entry's keys and values in all layers and heads."""
    return 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * dtype.itemsize
