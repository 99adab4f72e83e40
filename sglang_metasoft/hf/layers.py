"""A Hugging Face model's attention layers, and how the queries of each depend on their position."""

from typing import TYPE_CHECKING, Any

import torch

from sglang_metasoft.hf.shape import FULL, SLIDING, context_tokens
from sglang_metasoft.rope import find_turning
from sglang_metasoft.types import AttentionLayer, LayerKind, Rope

if TYPE_CHECKING:
    from sglang_metasoft.hf.model import HFModel

SEEN_TOKENS = 32  # whose queries are compared
SEED = 2606


@torch.no_grad()
def read_layers(model: "HFModel") -> list[AttentionLayer]:
    """All layers of a model of plain causal attention, in a window or not.

    The same hidden states are seen at the first positions and at the last: what attends there gets the outputs of the
    first run, so that nothing but a layer's own treatment of positions tells the queries apart.

    Raises:
        ValueError: a layer's attention is not plain causal attention.
    """
    shape, limit = model.shape, context_tokens(model.config)
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(shape.vocab_size, (min(SEEN_TOKENS, limit or SEEN_TOKENS),), generator=generator)
    embeds = model.embed(ids.to(model.device))[None]
    first_far = max(0, (limit or 0) - len(ids))
    near, far = {}, {}  # by layer: queries [n, H, d] and outputs, and queries

    def attend(layer, q, k, v, scale):
        near[layer] = q[0].transpose(0, 1), q
        return q

    def attend_far(layer, q, k, v, scale):
        far[layer] = q[0].transpose(0, 1)
        return near[layer][1]

    places = torch.arange(len(ids), device=model.device)[None]
    model.run(embeds, places, attend)
    ropes = _ropes(model, limit)
    model.run(embeds, places + first_far, attend_far)
    sizes = shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.head_dim
    found = []
    for layer, window in enumerate(model.windows):
        turning, rope = find_turning(near[layer][0], far[layer], first_far, ropes)
        kind = LayerKind.FULL if window is None else LayerKind.WINDOW
        found.append(AttentionLayer(kind, *sizes, window_tokens=window, turning=turning, rope=rope))
    return found


def _ropes(model: "HFModel", limit: int | None) -> list[Rope]:
    """What may turn queries: the decoder's rotary embedding, or that of each kind of layers, in either order."""
    module: Any = getattr(model.model.get_decoder(), "rotary_emb", None)
    if limit is None:
        return []
    if not isinstance(getattr(module, "inv_freq", None), torch.Tensor):
        tables = [
            _turned(torch.arange(limit, device=model.device), frequencies, getattr(module, f"{kind}_attention_scaling"))
            for kind in (FULL, SLIDING)
            if isinstance(frequencies := getattr(module, f"{kind}_inv_freq", None), torch.Tensor)
        ]
        return [Rope(table, is_neox) for table in tables for is_neox in (True, False)]
    places = torch.arange(limit, device=model.device)[None]
    # Some have other frequencies for long texts: those of all texts that are no longer than the short ones' limit.
    parameters = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    short = min(parameters.get("original_max_position_embeddings") or limit, limit)
    table = torch.cat([_table(module, model, places[:, :short]), _table(module, model, places)[short:]])
    return [Rope(table, is_neox) for is_neox in (True, False)]


def _table(module: Any, model: "HFModel", places: torch.Tensor) -> torch.Tensor:
    parameters = getattr(getattr(module, "config", None), "rope_parameters", None) or {}
    if "mrope_section" in parameters:  # three positions a token, and in transformers 5.12 no fewer
        places = places.expand(3, *places.shape)
    module(torch.empty(1, device=model.device, dtype=model.dtype), places)  # settles the frequencies for these
    return _turned(places.flatten(0, -2)[0], module.inv_freq, module.attention_scaling)


def _turned(places: torch.Tensor, frequencies: torch.Tensor, factor: float) -> torch.Tensor:
    angles = places[:, None].float() * frequencies.float()
    return torch.cat([angles.cos(), angles.sin()], -1) * factor
