"""Random LoRA adapters in PEFT's file format, and the model that each of them makes of a base model."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

RANK, ALPHA = 8, 16
# Of these SGLang's layers fuse q, k, v, and gate, up.
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_adapter(folder: Path, model, seed: int, size: float = 0.02, embeddings: bool = False) -> Path:
    """Write an adapter of a Hugging Face model; ``size`` is the standard deviation of its factors.

    Args:
        embeddings: also change the embedding table.
    """
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in model.named_modules():
        kind = name.rsplit(".", 1)[-1]
        if kind in MODULES:
            wide, narrow, sides = module.in_features, module.out_features, ("lora_A.weight", "lora_B.weight")
        elif kind == "embed_tokens" and embeddings:
            wide, narrow, sides = module.num_embeddings, module.embedding_dim, ("lora_embedding_A", "lora_embedding_B")
        else:
            continue
        for side, shape in zip(sides, ((RANK, wide), (narrow, RANK)), strict=True):
            tensors[f"base_model.model.{name}.{side}"] = torch.randn(shape, generator=random) * size
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0,
        "bias": "none", "target_modules": [*MODULES, *(["embed_tokens"] if embeddings else [])],
    }  # fmt: skip
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@torch.no_grad()
def merge_adapter(model, folder: Path) -> None:
    """Add an adapter without changed embeddings to the model's own weights."""
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, module in model.named_modules():
        key = f"base_model.model.{name}.lora_{{}}.weight"
        if key.format("A") in tensors:
            down, up = tensors[key.format("A")], tensors[key.format("B")]
            module.weight += (ALPHA / RANK * up @ down).to(module.weight.dtype)
