"""A model's shape by one reader, against what SGLang itself makes of the same configuration."""

import pytest
import transformers
from metasoft_patches.forward.model_shape import model_shape
from sglang.srt.configs.model_config import ModelConfig

from sglang_metasoft.hf.shape import read_shape
from sglang_metasoft.types import ModelShape

SIZES = dict(vocab_size=1000, hidden_size=48, num_hidden_layers=3, num_attention_heads=4)
QWEN_VL = {"text_config": SIZES | dict(num_key_value_heads=2, intermediate_size=64)}


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("Llama", SIZES | dict(num_key_value_heads=2, head_dim=16)),  # wider than hidden size over heads
        ("Mistral", SIZES | dict(num_key_value_heads=1, head_dim=None)),
        ("Qwen3", SIZES | dict(num_key_value_heads=2)),
        ("GPTNeoX", SIZES),
        ("Qwen2_5_VL", QWEN_VL),
    ],
)
def test_the_served_shape_is_sglangs_own_and_the_folders(tmp_path, name, sizes):
    config = getattr(transformers, f"{name}Config")(**sizes)
    suffix = "ForConditionalGeneration" if "text_config" in sizes else "ForCausalLM"
    config.architectures = [name + suffix]
    config.save_pretrained(tmp_path)
    served = ModelConfig(str(tmp_path))
    expected = ModelShape(
        str(tmp_path), served.vocab_size, served.hidden_size, served.num_hidden_layers,
        served.num_attention_heads, served.get_total_num_kv_heads(), served.head_dim,
    )  # fmt: skip
    assert model_shape(served) == read_shape(tmp_path) == expected
    assert expected.num_layers == 3 and expected.num_heads == 4
