"""Tiny models with random weights of the families that people deploy, as folders that SGLang and transformers load."""

import json
from pathlib import Path
from typing import NamedTuple

import torch
import transformers

from tests import tiny_vision

VOCABULARY, LAYERS, HEADS, KV_HEADS, HEAD_SIZE, HIDDEN = 512, 3, 4, 2, 16, 64
POSITIONS = 4096
COMMON = dict(
    vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS, intermediate_size=96, max_position_embeddings=POSITIONS,
    bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False,
)  # fmt: skip
SIZED = COMMON | dict(head_dim=HEAD_SIZE)
EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=48)
LONG_ROPE = dict(
    rope_type="longrope", rope_theta=10000.0, short_factor=[1.0] * 6, long_factor=[2.0] * 6,
    original_max_position_embeddings=2048, partial_rotary_factor=0.75,
)  # fmt: skip
GLM_MOE = EXPERTS | dict(
    n_routed_experts=4, n_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=1, norm_topk_prob=True,
    routed_scaling_factor=1.0, use_qk_norm=True,
)  # fmt: skip

HUNYUAN_MOE = EXPERTS | dict(num_experts=4, num_shared_experts=1, first_k_dense_replace=1)
YARN = dict(
    rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=1024, llama_4_scaling_beta=0.1,
    beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0,
)  # fmt: skip


class Tiny(NamedTuple):
    """A model: its class, its configuration, and what transformers' own does not know."""

    class_name: str
    settings: dict
    more: dict = {}  # None: its files have no such field
    has_twin: bool = True  # transformers computes the same; MiniMax-M2 there always has the norm that needs a GPU here
    served_by: str | None = None  # SGLang's class; None: it has the same name
    most_contested: float = 0.2  # share of kept entries whose values' routing has near ties
    entry_tolerance: float = 2e-3  # without a norm before attention values are large
    is_run: bool = True  # by servers in the tests; else SGLang's class needs a GPU, or fails by itself
    processor: str = ""  # of images, where it sees: its family in transformers


# What of the settings transformers is to see otherwise: SGLang's Mistral and StarCoder 2 ignore a window, and its
# Command-A counts one token more in it.
TWINS = {
    "mistral": dict(sliding_window=None), "starcoder2": dict(sliding_window=None), "cohere2": dict(sliding_window=81),
}  # fmt: skip
# The text part alone, as transformers has it, where a model has more: with one position a token.
TEXT_TWINS = {
    "mistral_small": "MistralForCausalLM",
    "qwen2_vl": "Qwen2ForCausalLM",
    "qwen2_5_vl": "Qwen2ForCausalLM",
    "qwen3_vl": "Qwen3ForCausalLM",
    "glm4v": "Glm4ForCausalLM",
}
ROWS = dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 3, 3])  # of positions: time, height, width
TOWER = dict(depth=2, hidden_size=32, out_hidden_size=HIDDEN, num_heads=2, intermediate_size=64) | dict(
    patch_size=tiny_vision.PATCH
)
SEEING = tiny_vision.special_ids(VOCABULARY) | dict(tie_word_embeddings=False)
WINDOW_TOKENS = 80
WINDOWED = dict(sliding_window=WINDOW_TOKENS, layer_types=["sliding_attention", "sliding_attention", "full_attention"])
WINDOWS_ALONE = dict(sliding_window=WINDOW_TOKENS, layer_types=["sliding_attention"] * LAYERS)
ROPES = dict(
    sliding_attention=dict(rope_type="default", rope_theta=10000.0),
    full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1000000.0),
)
OLMO3_ROPE = dict(rope_type="default", rope_theta=500000.0)
OLMO3_YARN = dict(
    rope_type="yarn", factor=4.0, original_max_position_embeddings=1024, attention_factor=1.138629436, beta_fast=32.0,
    beta_slow=1.0,
)  # fmt: skip
OLMO3_ROPES = dict(rope_parameters=dict(sliding_attention=OLMO3_ROPE, full_attention=OLMO3_ROPE | OLMO3_YARN))
GEMMA3 = SIZED | dict(query_pre_attn_scalar=HEAD_SIZE, tie_word_embeddings=True, rope_parameters=ROPES)
GRANITE = dict(embedding_multiplier=3.0, attention_multiplier=0.2, residual_multiplier=0.5, logits_scaling=2.0)
MODELS = {
    "llama": Tiny("LlamaForCausalLM", SIZED),
    "qwen2": Tiny("Qwen2ForCausalLM", COMMON),
    "qwen3": Tiny("Qwen3ForCausalLM", SIZED),
    "qwen2_moe": Tiny(
        "Qwen2MoeForCausalLM",
        COMMON | EXPERTS | dict(num_experts=4, shared_expert_intermediate_size=48),
        is_run=False,
    ),
    "qwen3_moe": Tiny("Qwen3MoeForCausalLM", SIZED | EXPERTS | dict(num_experts=4, norm_topk_prob=True)),
    "glm4": Tiny("Glm4ForCausalLM", SIZED),
    "glm4_moe": Tiny("Glm4MoeForCausalLM", SIZED | GLM_MOE),
    "minimax_m2": Tiny(
        "MiniMaxM2ForCausalLM",
        SIZED | dict(num_local_experts=4, num_experts_per_tok=2, rotary_dim=8),
        dict(scoring_func="sigmoid", use_routing_bias=True, use_qk_norm=False),  # whose kernel needs a GPU
        has_twin=False,
    ),
    "mistral": Tiny("MistralForCausalLM", SIZED | dict(sliding_window=256)),
    "mistral_small": Tiny(
        "Mistral3ForConditionalGeneration",
        dict(
            text_config=COMMON | dict(model_type="mistral", head_dim=HEAD_SIZE, sliding_window=None),
            vision_config=dict(
                model_type="pixtral",
                hidden_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                head_dim=16,
                intermediate_size=48,
                image_size=64,
                patch_size=16,
            ),
            image_token_index=10,
            tie_word_embeddings=False,
            spatial_merge_size=2,
            language_model_only=True,
        ),
    ),  # fmt: skip
    "phi3": Tiny(
        "Phi3ForCausalLM",
        COMMON | dict(rope_parameters=LONG_ROPE, original_max_position_embeddings=2048),
        dict(partial_rotary_factor=0.75),
    ),
    "granite": Tiny("GraniteForCausalLM", COMMON | GRANITE),
    "granite_hybrid": Tiny(
        "GraniteMoeHybridForCausalLM",
        COMMON
        | GRANITE
        | dict(layer_types=["attention"] * LAYERS, num_local_experts=0, shared_intermediate_size=96)
        | dict(position_embedding_type="rope"),
    ),
    "olmo2": Tiny("Olmo2ForCausalLM", COMMON),
    "hunyuan_v1": Tiny("HunYuanDenseV1ForCausalLM", SIZED | dict(use_qk_norm=True), is_run=False),
    "hunyuan_v3": Tiny("HYV3ForCausalLM", SIZED | HUNYUAN_MOE, dict(route_norm=True, qk_norm=True)),
    "command_r": Tiny("CohereForCausalLM", COMMON | dict(logit_scale=0.5, tie_word_embeddings=True)),
    "starcoder2": Tiny("Starcoder2ForCausalLM", COMMON | dict(sliding_window=256, tie_word_embeddings=True)),
    "ministral3": Tiny(
        "Ministral3ForCausalLM", SIZED | dict(rope_parameters=YARN), dict(original_max_position_embeddings=1024)
    ),
    "gemma3": Tiny("Gemma3ForCausalLM", GEMMA3 | WINDOWED),
    "windows_alone": Tiny("Gemma3ForCausalLM", GEMMA3 | WINDOWS_ALONE),
    "olmo3": Tiny(
        "Olmo3ForCausalLM",
        COMMON | WINDOWED | OLMO3_ROPES,
        dict(rope_parameters=None, rope_theta=500000.0, rope_scaling=OLMO3_YARN),  # as its files have it
        served_by="Olmo2ForCausalLM",
    ),
    "exaone4": Tiny(
        "Exaone4ForCausalLM",
        COMMON
        | WINDOWED
        | dict(sliding_window_pattern="LLG", rope_parameters=dict(rope_type="default", rope_theta=1e6)),
        dict(architectures=["Exaone4OnAnyBackend"]),
        served_by="Exaone4OnAnyBackend",
        entry_tolerance=5e-3,
    ),
    "cohere2": Tiny("Cohere2ForCausalLM", COMMON | WINDOWED | dict(logit_scale=0.5, tie_word_embeddings=True)),
    "gpt2": Tiny(
        "GPT2LMHeadModel",
        dict(vocab_size=VOCABULARY, n_positions=2048, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS)
        | dict(bos_token_id=1, eos_token_id=2),
        most_contested=0.4,  # four KV heads, and keys that positions alone tell apart
    ),
    "qwen2_vl": Tiny(
        "Qwen2VLForConditionalGeneration",
        SEEING
        | dict(
            text_config=COMMON | dict(rope_parameters=ROWS),
            vision_config=dict(depth=2, embed_dim=32, hidden_size=HIDDEN, num_heads=2, mlp_ratio=2, in_chans=3)
            | dict(patch_size=tiny_vision.PATCH),
        ),
        processor="Qwen2VL",
    ),
    "qwen2_5_vl": Tiny(
        "Qwen2_5_VLForConditionalGeneration",
        SEEING
        | dict(
            text_config=COMMON | dict(rope_parameters=ROWS),
            vision_config=TOWER | dict(window_size=4 * tiny_vision.PATCH, fullatt_block_indexes=[1]),
        ),
        processor="Qwen2_5_VL",
    ),
    "qwen3_vl": Tiny(
        "Qwen3VLForConditionalGeneration",
        SEEING
        | dict(
            text_config=SIZED | dict(rope_parameters=ROWS | dict(mrope_interleaved=True)),
            vision_config=TOWER | dict(num_position_embeddings=64, deepstack_visual_indexes=[0]),
        ),
        processor="Qwen3VL",
    ),
    "glm4v": Tiny(
        "Glm4vForConditionalGeneration",
        SEEING
        | dict(
            text_config=COMMON | dict(rope_parameters=ROWS | dict(mrope_section=[1, 1, 2], partial_rotary_factor=0.5)),
            vision_config=TOWER | dict(image_size=8 * tiny_vision.PATCH),
        ),
        processor="Glm4v",
    ),
}


def make_model(folder: Path, name: str) -> Path:
    """Write a model's configuration and weights; returns the folder."""
    tiny = MODELS[name]
    model = draw(name)
    model.save_pretrained(folder)
    file = folder / "config.json"
    config = json.loads(file.read_text()) | {"architectures": [tiny.class_name]} | tiny.more
    file.write_text(json.dumps({name: value for name, value in config.items() if tiny.more.get(name, "") is not None}))
    if tiny.processor:
        tiny_vision.save_processor(folder, tiny.processor, VOCABULARY)
    return folder


def make_twin(folder: Path, name: str) -> Path:
    """The same weights as transformers computes what SGLang does: text alone, and without the window it ignores."""
    model = draw(name, **TWINS.get(name, {}))
    if name in TEXT_TWINS:
        twin_class = getattr(transformers, TEXT_TWINS[name])
        settings = {"head_dim": HEAD_SIZE} | model.config.text_config.to_dict()
        settings["rope_parameters"].pop("mrope_section", None)
        twin = twin_class(twin_class.config_class(**settings)).float()
        twin.model.load_state_dict(model.model.language_model.state_dict())
        twin.lm_head.load_state_dict(model.lm_head.state_dict())
        model = twin
    model.save_pretrained(folder)
    return folder


def draw(name: str, **settings) -> torch.nn.Module:
    """The model as transformers has it; ``settings`` change its configuration."""
    model_class = getattr(transformers, MODELS[name].class_name)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**MODELS[name].settings | settings)).float()
    draw_weights(model)
    return model


@torch.no_grad()
def draw_weights(model: torch.nn.Module) -> None:
    """Random ones that leave no two layers, heads or tokens alike; norms too are not ones."""
    unit = 0.0 if "gemma" in model.config.model_type else 1.0  # Gemma's norms add one
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            spread, center = (0.3, unit) if "norm" in name and "bias" not in name else (0.1, 0.0)
            weight.copy_(center + spread * torch.randn_like(weight))
        else:
            width = HIDDEN**0.5 if "embed" in name or "wte" in name else weight.shape[-1] ** 0.5
            weight.copy_(torch.randn_like(weight) * (1.5 / width if width else 1))
