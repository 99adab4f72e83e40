"""A trained student -> the folder that a server loads."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from sglang_metasoft.compressor.files import CHECK_ROWS, CONFIG_NAME, FORMAT, WEIGHTS_NAME
from sglang_metasoft.train.backbone import Backbone
from sglang_metasoft.train.prepare import write_atomically
from sglang_metasoft.train.student import MetaSoftStudent, Student


def export(
    student: Student, backbone: Backbone, folder: Path, dtype: torch.dtype = torch.bfloat16, report: dict | None = None
) -> None:
    """Write ``config.json`` and ``model.safetensors``; each whole or not at all.

    Args:
        dtype: of the weights on disk.
        report: what it keeps, as :func:`sglang_metasoft.train.card.short` says it; goes into the configuration.

    Raises:
        ValueError: they could not be written.
    """
    shape = backbone.shape
    if isinstance(student, MetaSoftStudent):
        config = {"format": FORMAT, "model": shape._asdict(), "sizes": student.soft.sizes}
        tensors = student.soft.state_dict()
    else:
        tokens = student.static_tokens.detach()
        sizes = dict(
            hidden_size=shape.hidden_size,
            count=len(tokens),
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
        )
        config = {"format": FORMAT, "method": "judge_q", "model": shape._asdict(), "sizes": sizes}
        ids = torch.arange(CHECK_ROWS, device=backbone.device) * (shape.vocab_size // CHECK_ROWS)
        tensors = {"static_tokens": tokens, "embedding_check": backbone.embed(ids)}
    if report is not None:
        config["report"] = report
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
    write_atomically(folder / WEIGHTS_NAME, lambda path: save_file(tensors, path))
    write_atomically(folder / CONFIG_NAME, lambda path: path.write_text(json.dumps(config, indent=2) + "\n"))
