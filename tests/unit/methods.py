"""Methods and layers on plain tensors, for the tests of methods and consolidations."""

import torch

from sglang_metasoft.compressor.soft_tokens import SoftTokens
from sglang_metasoft.compressor.static_tokens import StaticTokens
from sglang_metasoft.config import MetaSoftConfig
from sglang_metasoft.methods import load_method
from sglang_metasoft.types import (
    AttentionLayer,
    Job,
    LayerKind,
    LayerPool,
    LayerView,
    ModelShape,
    Plan,
    Probe,
    Prompt,
    Rope,
    Turning,
)

SHAPE = ModelShape("tiny", 1000, 48, 2, 6, 3, 16)
SPAN, TAIL, KEPT = 200, 64, 50
CPU = torch.device("cpu")


def rope_table(positions: int = 4096, d: int = 16, device=None) -> torch.Tensor:
    """``[positions, d]`` cosines, then sines."""
    angles = torch.outer(torch.arange(positions).float(), 100.0 ** -(torch.arange(0, d, 2) / d))
    return torch.cat([angles.cos(), angles.sin()], dim=1).to(device or "cpu")


def layer_with(rope: Rope | None, turning: Turning = Turning.ROPE) -> AttentionLayer:
    """A layer of the tiny shape."""
    sizes = SHAPE.num_heads, SHAPE.num_kv_heads, SHAPE.head_dim, SHAPE.head_dim
    return AttentionLayer(LayerKind.FULL, *sizes, turning=turning, rope=rope)


class TinyModel:
    """What a method asks of the loaded model: queries with a direction of their own, a word a token."""

    def __init__(self, device) -> None:
        self.device = device

    def layers(self) -> list[AttentionLayer]:
        rope = Rope(rope_table(device=self.device), True)
        return [layer_with(rope) for _ in range(SHAPE.num_layers)]

    def encode(self, text: str) -> list[int]:
        return [len(word) for word in text.split()]

    def queries(self, ids: torch.Tensor) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(4)
        shape = (ids.numel(), SHAPE.num_heads, SHAPE.head_dim)
        return [
            (torch.randn(shape, generator=generator) + 2 * torch.randn(shape[1:], generator=generator)).to(self.device)
            for _ in range(SHAPE.num_layers)
        ]


def make_method(name: str, monkeypatch=None, device=CPU, **settings):
    """A method as the scheduler makes it, for the tiny shape."""
    table = torch.randn(SHAPE.vocab_size, SHAPE.hidden_size, generator=torch.Generator().manual_seed(5)).to(device)
    if monkeypatch is not None:
        # Writing and reading files is tested elsewhere; fake tensors could not be written.
        def make_soft_tokens(shape, count, embed, device):
            with device:
                return SoftTokens(shape.hidden_size, 40, 8, shape.num_layers, shape.num_kv_heads)

        monkeypatch.setattr(SoftTokens, "untrained", make_soft_tokens)
    static = StaticTokens(torch.randn(8, SHAPE.hidden_size, generator=torch.Generator().manual_seed(6)).to(device))
    if name == "judge_q":
        settings = {"path": "static"} | settings
    original = StaticTokens.load
    StaticTokens.load = lambda *args: static
    try:
        method = load_method(name)(MetaSoftConfig(method=name, **settings), SHAPE, lambda ids: table[ids], device)
    finally:
        StaticTokens.load = original
    method.prepare(TinyModel(device))
    return method


def make_prompt(device=None) -> Prompt:
    ids = torch.arange(SPAN + TAIL, device=device)
    return Prompt(ids[:SPAN], ids[SPAN:], SPAN + TAIL, SPAN + TAIL)


def make_job(probe: Probe, kept: int = KEPT, device=None) -> Job:
    slots = torch.arange(SPAN + TAIL, device=device)
    return Job(Plan(0, SPAN, kept, 4), probe, slots[: probe.context_slots], slots[:SPAN], slots[:kept])


def make_pool(device=None, dtype=torch.float32) -> LayerPool:
    generator = torch.Generator().manual_seed(7)
    buffers = [torch.randn(SPAN + TAIL, SHAPE.num_kv_heads, SHAPE.head_dim, generator=generator) for _ in range(2)]
    return LayerPool(*(buffer.to(device=device, dtype=dtype) for buffer in buffers), 0.25, 1.0, 1.0)


def make_tensors(tokens: int, device=None) -> list[torch.Tensor]:
    """q, k and v of the probe tokens."""
    generator = torch.Generator().manual_seed(8)
    heads = (SHAPE.num_heads, SHAPE.num_kv_heads, SHAPE.num_kv_heads)
    return [torch.randn(tokens, number, SHAPE.head_dim, generator=generator).to(device) for number in heads]


def make_view(tokens: int, seen_tokens: int = SPAN + TAIL) -> LayerView:
    q, _, _ = make_tensors(tokens)
    job = make_job(Probe(torch.empty(tokens, SHAPE.hidden_size), seen_tokens, seen_tokens))
    return LayerView(job, make_pool(), q, torch.full(q.shape[:2], 6.0), 1)
