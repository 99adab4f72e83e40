"""Ten steps of training on tiny random models of other families: what comes out is this model's, and no other's."""

import pytest
import torch
import transformers

from sglang_metasoft.compressor.find import check_given, given_compressor
from sglang_metasoft.config import MetaSoftConfig
from sglang_metasoft.hf.shape import read_shape
from sglang_metasoft.methods import load_method
from sglang_metasoft.train.backbone import Backbone
from sglang_metasoft.train.command import train

CPU = torch.device("cpu")
SIZES = dict(
    vocab_size=49152, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=12, max_position_embeddings=4096, initializer_range=0.3, bos_token_id=1,
    eos_token_id=2,
)  # fmt: skip
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
SCALED = dict(
    rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=512,
)  # fmt: skip
FAMILIES = {
    "Qwen2": dict(tie_word_embeddings=True),
    "Qwen3": dict(tie_word_embeddings=False),
    "Qwen3Moe": MOE,
    "Mistral": dict(sliding_window=None),
    "Llama": dict(rope_parameters=SCALED),
    # Trained are the layers that see all tokens; the window is shorter than the prompts.
    "Gemma3Text": dict(
        layer_types=["sliding_attention", "full_attention"], sliding_window=40, query_pre_attn_scalar=12, pad_token_id=0
    ),
}


@pytest.fixture(params=FAMILIES)
def family(request, tokenizer, tmp_path):
    """Folder of a random model."""
    torch.manual_seed(5)
    config = getattr(transformers, f"{request.param}Config")(**SIZES | FAMILIES[request.param])
    folder = tmp_path / request.param.lower()
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_ten_steps_make_a_compressor_of_this_model(family, settings, tmp_path):
    run = settings(model=str(family), prepared=tmp_path / "prepared", steps=8, selector_steps=2)
    scores = train(run)
    assert 0 < scores["overlap metasoft inside 4x"] <= 1
    path, backbone = str(run.output / "compressor"), Backbone(str(family), CPU, torch.float32)
    shape = read_shape(family)
    compressor = given_compressor(path, shape)
    check_given(compressor, shape, backbone.embed, CPU)
    method = load_method("metasoft")(MetaSoftConfig(method="metasoft", path=path), shape, backbone.embed, CPU)
    method.prepare(backbone)
    assert method.consolidation_name == "key_bias" and method.soft_tokens.scorer is not None
    with pytest.raises(ValueError, match="whose embedding table is not that of the served model"):
        check_given(compressor, shape, lambda ids: backbone.embed(ids).flip(-1), CPU)
