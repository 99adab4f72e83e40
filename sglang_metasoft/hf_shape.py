"""What a Hugging Face folder's configuration says of a model, without its weights."""

from pathlib import Path

import torch
from transformers import AutoConfig

from sglang_metasoft.config import shown
from sglang_metasoft.types import ModelShape


def read_config(folder: str | Path):
    """The configuration in ``folder``.

    Raises:
        ValueError: there is none that transformers knows.
    """
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model path: {shown(str(folder))} holds no Hugging Face model: {error}") from None


def read_shape(folder: str | Path) -> ModelShape:
    """The model in ``folder`` as a compressor knows it, from its configuration alone.

    Raises:
        ValueError: no configuration there, or not one of a decoder with plain attention heads.
    """
    config = read_config(folder)
    text = config.get_text_config(decoder=True)
    try:
        heads, hidden = text.num_attention_heads, text.hidden_size
        return ModelShape(
            name=str(folder),
            vocab_size=text.vocab_size,
            hidden_size=hidden,
            num_layers=text.num_hidden_layers,
            num_heads=heads,
            num_kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or hidden // heads,
        )
    except AttributeError as error:
        kind = type(config).__name__
        raise ValueError(f"model path: {shown(str(folder))} ({kind}) has no plain attention heads: {error}") from None


def kv_bytes_per_entry(shape: ModelShape, dtype: torch.dtype) -> int:
    """Bytes of one entry's keys and values in all layers and heads."""
    return 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * dtype.itemsize
