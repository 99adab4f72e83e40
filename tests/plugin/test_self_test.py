"""The self-test of a start, on decoders of SGLang's own attention layers: who passes, who is refused, and what it sees.

Each decoder differs from a plain one in what some deployed family does (named beside it).
"""

from types import SimpleNamespace

import pytest
import torch
from metasoft_patches.cpu.attention import TorchRowsBackend
from metasoft_patches.forward import probe
from metasoft_patches.forward import self_test as self_test_module
from metasoft_patches.forward.body import Body
from metasoft_patches.forward.layers import read_layers
from metasoft_patches.forward.model_shape import check_layers, check_pool
from metasoft_patches.forward.probe import ProbeBackend
from metasoft_patches.forward.self_test import SelfTest
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.layers.rotary_embedding import get_rope
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

from sglang_metasoft.consolidations.key_directions import fit_key_directions
from sglang_metasoft.types import LayerKind, ModelShape, Turning

HEADS, KV_HEADS, SIZE, LAYERS, VOCABULARY, POSITIONS = 4, 2, 16, 3, 128, 2048
HIDDEN = HEADS * SIZE
ROWS = {"rope_type": "default", "mrope_section": [2, 3, 3]}
INTERLEAVED = ROWS | {"mrope_interleaved": True}
SHAPE = ModelShape("tiny", VOCABULARY, HIDDEN, LAYERS, HEADS, KV_HEADS, SIZE)


class Table(VocabParallelEmbedding):
    """The embedding table of one rank."""

    def __init__(self) -> None:
        super().__init__(VOCABULARY, HIDDEN, enable_tp=False)
        torch.nn.init.normal_(self.weight)

    def forward(self, ids):
        return torch.nn.functional.embedding(ids, self.weight)


class Attention(torch.nn.Module):
    """One layer's attention; options as of ``Decoder``."""

    def __init__(self, number: int, options: dict) -> None:
        super().__init__()
        self.options = options
        self.qkv = torch.nn.Linear(HIDDEN, (HEADS + 2 * KV_HEADS) * SIZE)
        self.o = torch.nn.Linear(HEADS * SIZE, HIDDEN)
        is_turned = options.get("rope", True) and (number + 1) % options.get("no_rope_every", 10**9) != 0
        table = dict(rotary_dim=SIZE, max_position=POSITIONS, base=10000.0, rope_scaling=None, is_neox_style=True)
        self.rotary_emb = get_rope(SIZE, **table | options.get("table", {})) if is_turned else None
        if options.get("norm_after"):
            self.norm = torch.nn.Parameter(1 + 0.4 * torch.randn(SIZE))
        if options.get("has_sinks"):
            self.sinks = torch.nn.Parameter(torch.full((HEADS,), 4.0))
        self.attn = RadixAttention(HEADS, SIZE, SIZE**-0.5, KV_HEADS, number, **options.get("attention", {}))

    def forward(self, positions, hidden, batch):
        q, k, v = self.qkv(hidden).split([HEADS * SIZE, KV_HEADS * SIZE, KV_HEADS * SIZE], dim=-1)
        if self.rotary_emb is not None:
            q, k = self.rotary_emb(positions, q, k)
        if self.options.get("norm_after"):  # a row a head, as Hunyuan v1 calls its attention
            q, k = (x.reshape(-1, SIZE) * self.norm for x in (q, k))
        if beta := self.options.get("beta"):
            q = q * (1 + beta * torch.log1p((positions // 1024).float()))[:, None]
        sinks = {"sinks": self.sinks} if self.options.get("has_sinks") else {}
        return self.o(self.attn(q, k.view(-1, KV_HEADS, SIZE), v.view(-1, KV_HEADS, SIZE), batch, **sinks))


class Inner(torch.nn.Module):
    """A decoder body that takes ids and embeddings, and has a factor for ids alone."""

    def __init__(self, options: dict) -> None:
        super().__init__()
        self.factor, self.reads_ids = options.get("factor", 1.0), options.get("reads_ids", False)
        self.word_table = Table()
        self.layers = torch.nn.ModuleList(Attention(number, options) for number in range(LAYERS))

    def forward(self, input_ids, positions, forward_batch, inputs_embeds=None):
        hidden = self.word_table(input_ids) * self.factor if inputs_embeds is None else inputs_embeds
        for layer in self.layers:
            hidden = hidden + layer(positions, hidden, forward_batch)
        if self.reads_ids:
            hidden = hidden + input_ids[:, None] / 64
        return hidden


class Decoder(torch.nn.Module):
    """A model of SGLang's kind, its body behind ``language_model.model`` as a vision model has it."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.language_model = torch.nn.Module()
        self.language_model.model = Inner(options)
        self.tower = torch.nn.Sequential(Table())  # beside the body
        self.is_mrope_enabled, self.stride = options.get("has_rows", False), options.get("stride", 1)

    def forward(self, input_ids, positions, forward_batch):
        if self.is_mrope_enabled:
            positions = forward_batch.mrope_positions
        return self.language_model.model(input_ids, positions * self.stride, forward_batch)


class Plain:
    """The adapter, as far as a self-test asks it."""

    def plan_attention(self, runner, batch) -> None:
        runner.attn_backend.init_forward_metadata(batch)

    def forward_scope(self, model, backend, batch):
        return forward_context(ForwardContext(attn_backend=backend))


class Slots:
    """The allocator and the committer's part in it."""

    def __init__(self) -> None:
        self.pool = MHATokenToKVPool(512, 1, torch.float32, KV_HEADS, SIZE, LAYERS, "cpu", False)
        self.req_to_token_pool = ReqToTokenPool(2, 512, "cpu", False)
        self.allocator = SimpleNamespace(available_size=lambda: 512)
        self.taken = 0

    def reserve(self, tokens: int) -> torch.Tensor:
        self.taken += tokens
        return torch.randperm(511)[:tokens] + 1

    def release(self, slots: torch.Tensor) -> None:
        self.taken -= len(slots)


def self_test(model: torch.nn.Module, slots: Slots | None = None) -> list:
    """Run it; returns the layers."""
    slots = slots or Slots()
    runner = SimpleNamespace(
        model=model, device="cpu", dtype=torch.float32, req_to_token_pool=slots.req_to_token_pool,
        token_to_kv_pool=slots.pool,
        model_config=SimpleNamespace(
            context_len=POSITIONS, vocab_size=VOCABULARY, model_is_mrope=getattr(model, "is_mrope_enabled", False)
        ),
    )  # fmt: skip
    runner.attn_backend = TorchRowsBackend(runner)
    scheduler = SimpleNamespace(tp_worker=SimpleNamespace(model_runner=runner), page_size=1)
    try:
        return SelfTest(scheduler, Plain(), slots, Body(model), read_layers(model), "torch").run()
    finally:
        assert slots.taken == 0, "the slots go back, whatever comes out"


@pytest.mark.parametrize(
    ("options", "turnings"),
    [
        ({}, [Turning.ROPE] * LAYERS),
        ({"table": {"is_neox_style": False, "rotary_dim": 8}}, [Turning.ROPE] * LAYERS),  # GLM-4
        ({"no_rope_every": 2}, [Turning.ROPE, Turning.NONE, Turning.ROPE]),  # Llama 4
        ({"rope": False}, [Turning.NONE] * LAYERS),
        ({"norm_after": True}, [Turning.OTHER] * LAYERS),  # Hunyuan v1
        ({"beta": 0.1}, [Turning.OTHER] * LAYERS),  # Ministral 3
        ({"factor": 12.0}, [Turning.ROPE] * LAYERS),  # MiniCPM, Granite 4
        ({"has_rows": True, "table": {"rope_scaling": ROWS}}, [Turning.ROPE] * LAYERS),  # Qwen2-VL
        ({"has_rows": True, "table": {"rope_scaling": INTERLEAVED}}, [Turning.ROPE] * LAYERS),  # Qwen3-VL
    ],
    ids=str,
)
def test_what_a_position_does_to_queries_is_seen(options, turnings):
    layers = self_test(Decoder(**options))
    assert [layer.turning for layer in layers] == turnings
    assert [layer.rope is not None for layer in layers] == [turning is Turning.ROPE for turning in turnings]
    assert all(layer.peculiarity is None and layer.kind is LayerKind.FULL for layer in layers)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attention": {"logit_cap": 0.5}}, "the attention of attention layer 0 differs by"),
        ({"reads_ids": True}, "the hidden states after the last layer differ by"),
        ({"stride": 2}, "the queries of attention layer 0 differs by"),  # of positions, around the body
    ],
    ids=str,
)
def test_who_computes_something_else_under_a_probe_is_refused_with_the_layer(options, words):
    with pytest.raises(
        ValueError, match=f"model class Decoder is not supported: under a probe {words} .* of (its|their) norm"
    ):
        self_test(Decoder(**options))


@pytest.mark.parametrize("window", [2, 20, 64, 300])
def test_a_probe_sees_the_same_window(window, monkeypatch):
    """Shorter than the probe, or longer than a test without a window."""
    model = Decoder(attention={"sliding_window_size": window - 1})
    layers = self_test(model)
    assert {(layer.kind, layer.window_tokens, layer.turning) for layer in layers} == {
        (LayerKind.WINDOW, window, Turning.ROPE)
    }
    check_layers(model, layers, SHAPE, 1)
    for other in (None, window + 1, window - 1 if window > 2 else window + 2):
        monkeypatch.setattr(probe, "window_of", lambda layer, other=other: other)
        monkeypatch.setattr(self_test_module, "TOLERANCE", {torch.float32: 1e-5})
        with pytest.raises(ValueError, match="under a probe the attention of attention layer 0 differs by"):
            self_test(model)


def test_a_probe_refuses_what_it_is_not_told_about():
    """Sinks reach a backend as an argument of their own."""
    with pytest.raises(ValueError, match=r"takes \['sinks'\], which a probe does not know"):
        self_test(Decoder(has_sinks=True))


def test_a_factor_that_embeddings_do_not_get_is_found(monkeypatch):
    """Where a body's own parameter is used instead of its table's place, embeddings come in without the factor."""

    def by_parameter(self, module, input_ids, positions, batch, embeds):
        return module(input_ids, positions, batch, **({} if embeds is None else {"inputs_embeds": embeds}))

    monkeypatch.setattr(Body, "_call", by_parameter)
    self_test(Decoder())
    with pytest.raises(ValueError, match="under a probe the queries of attention layer 0 differs by 0.9"):
        self_test(Decoder(factor=12.0))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attention": {"logit_cap": 30.0}}, "attention layer 0 caps its logits at 30"),
        ({"attention": {"attn_type": AttentionType.ENCODER_ONLY}}, "is not causal self-attention"),
        ({"attention": {"v_head_dim": 8}}, "has keys of size 16 and values of size 8"),
        ({"has_sinks": True}, "has attention sinks of its own"),
    ],
    ids=str,
)
def test_what_the_layers_say_of_themselves_is_refused_before_anything_runs(options, words):
    model = Decoder(**options)
    with pytest.raises(ValueError, match=words):
        check_layers(model, read_layers(model), SHAPE, 1)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (
            SHAPE._replace(num_kv_heads=HEADS),
            "has 4 query and 2 KV heads of size 16 a rank; its configuration says 4, 4",
        ),
        (SHAPE._replace(num_layers=4), "3 attention layers found, 4 expected"),
        (SHAPE._replace(head_dim=8), "says 4, 2 and 8"),
    ],
)
def test_layers_that_a_configuration_does_not_tell_of_are_refused(shape, words):
    """A configuration may count its KV heads under another name: Step3."""
    model = Decoder()
    check_layers(model, read_layers(model), SHAPE, 1)
    with pytest.raises(ValueError, match=words):
        check_layers(model, read_layers(model), shape, 1)


def test_a_pool_of_another_kind_is_refused_by_name():
    """Pools of recurrent layers have no layout."""
    check_pool(Slots().pool)
    with pytest.raises(ValueError, match="KV pool SimpleNamespace .layout None. is not supported"):
        check_pool(SimpleNamespace())


def test_a_models_own_layers_are_counted_by_their_order():
    """Where attention layers are not all layers, their ids have gaps."""
    model = Decoder()
    layers = [layer.attn for layer in model.language_model.model.layers]
    for layer, layer_id in zip(layers, (3, 7, 11), strict=True):
        layer.layer_id = layer_id
    backend = ProbeBackend(model, None, None, [], None)
    assert [backend.numbers[id(layer)] for layer in layers] == [0, 1, 2]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda inner: delattr(inner, "word_table"), "no module holds an embedding table and all attention layers"),
        (lambda inner: setattr(inner, "second", Table()), "its body Inner has 2 embedding tables"),
        (lambda inner: setattr(inner, "forward", lambda input_ids, states: None), "its Inner needs states"),
    ],
)
def test_a_body_that_cannot_be_called_is_refused_by_name(change, words):
    model = Decoder()
    change(model.language_model.model)
    with pytest.raises(ValueError, match=f"model class Decoder is not supported: {words}"):
        Body(model)


def test_the_body_is_found_behind_other_names_and_takes_embeddings_in_its_tables_place():
    model = Decoder(factor=3.0)
    body = Body(model)
    assert body.module is model.language_model.model and body.table is body.module.word_table
    seen = []
    body.module.layers = torch.nn.ModuleList()
    body.module.register_forward_hook(lambda module, args, out: seen.append(out))
    embeds, ids = torch.randn(5, HIDDEN), torch.zeros(5, dtype=torch.int64)
    assert torch.equal(body.hidden_states(ids, ids, None, embeds), 3 * embeds)
    assert torch.equal(body.hidden_states(ids, ids, None), 3 * body.table(ids)), "and then the table answers again"


def test_directions_follow_what_was_seen():
    """Turned where queries are, unturned where they are not, and none where a position does more."""
    plain = self_test(Decoder())
    seen = [
        plain[0],
        plain[1]._replace(turning=Turning.NONE, rope=None),
        plain[2]._replace(turning=Turning.OTHER, rope=None),
    ]
    common = torch.randn(1, HEADS, SIZE)
    model = SimpleNamespace(
        layers=lambda: seen, encode=lambda text: list(range(100)),
        queries=lambda ids: [common + 0.1 * torch.randn(len(ids), HEADS, SIZE)] * LAYERS,
    )  # fmt: skip
    found = fit_key_directions(model, SHAPE, torch.device("cpu"))
    near, far = found.at(0), found.at(1000)
    assert not torch.equal(near[0], far[0]) and near[0].norm() > 0
    assert torch.equal(near[1], far[1])
    raised = torch.einsum("hd,hd->h", common[0], near[1].repeat_interleave(HEADS // KV_HEADS, 0))
    assert (raised.view(KV_HEADS, -1).mean(1) - 1).abs().max() < 0.1
    assert not near[2].any() and not far[2].any()
    seen[:] = [seen[2]] * LAYERS
    with pytest.raises(ValueError, match="no key can carry a bias; allowed: another consolidation"):
        fit_key_directions(model, SHAPE, torch.device("cpu"))
