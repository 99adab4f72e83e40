"""The Hugging Face model that evaluation, inspection and training share, against transformers' own eager attention."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache

from sglang_metasoft.config import MetaSoftConfig
from sglang_metasoft.hf.cache import Batch, generate
from sglang_metasoft.hf.compress import compress, probe_of
from sglang_metasoft.hf.model import PREFILL_CHUNK_TOKENS, HFModel, LayerKV
from sglang_metasoft.hf.shape import read_shape
from sglang_metasoft.inspect.inspected_model import InspectedModel
from sglang_metasoft.methods import load_method
from sglang_metasoft.pipeline.plan import plan_span
from sglang_metasoft.train.backbone import Backbone, Layers
from sglang_metasoft.types import ModelShape

CPU = torch.device("cpu")
PROMPT_TOKENS, LATER_TOKENS = PREFILL_CHUNK_TOKENS + 76, 9
SIZES = dict(
    vocab_size=49152, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=2048, initializer_range=0.3, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
GROUPED = SIZES | dict(num_key_value_heads=2, head_dim=12)
WINDOW_TOKENS = 90
MIXED = GROUPED | dict(layer_types=["sliding_attention", "full_attention"], sliding_window=WINDOW_TOKENS)
ALL_WINDOWS = dict(layer_types=["sliding_attention"] * 2, pad_token_id=0)
CHUNKED = dict(layer_types=["full_attention", "chunked_attention"], num_local_experts=2, pad_token_id=0)
WINDOWED = {
    "Gemma3Text": MIXED | dict(query_pre_attn_scalar=12, pad_token_id=0),
    "Cohere2": MIXED | dict(pad_token_id=0),
    "Olmo3": MIXED | dict(pad_token_id=0),
    "Exaone4": MIXED | dict(sliding_window_pattern="LG", pad_token_id=0),
}
MODELS = {
    "Llama": GROUPED,
    # Embeddings, attention and logits each have a factor of their own.
    "Granite": GROUPED
    | dict(logits_scaling=8.0, embedding_multiplier=3.0, attention_multiplier=0.2, residual_multiplier=0.5),
    "GPTNeoX": SIZES | dict(rotary_pct=0.5),  # as many KV heads as query heads, half of each turned
}

YARN = dict(
    rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=1024, llama_4_scaling_beta=0.1,
    beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0,
)  # fmt: skip
LONG_ROPE = dict(
    rope_type="longrope", rope_theta=10000.0, short_factor=[1.0] * 6, long_factor=[2.0] * 6, factor=2.0,
    original_max_position_embeddings=2048,
)  # fmt: skip


@pytest.fixture(scope="module")
def make_model(tokenizer, tmp_path_factory):
    """Write a tiny model of a class of transformers to a folder."""

    def make(name: str, **sizes):
        torch.manual_seed(7)
        folder = tmp_path_factory.mktemp(name) / name
        config = getattr(transformers, f"{name}Config")(**sizes)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="module", params=MODELS)
def folder(request, make_model):
    return make_model(request.param, **MODELS[request.param])


@pytest.mark.parametrize("name", [*MODELS, *WINDOWED])
def test_three_users_have_the_entries_and_logits_that_transformers_computes(name, make_model, document_ids, tokenizer):
    folder = make_model(name, **(MODELS | WINDOWED)[name])
    prompt, later = document_ids[:PROMPT_TOKENS], document_ids[PROMPT_TOKENS : PROMPT_TOKENS + LATER_TOKENS]
    eager, cache = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager"), DynamicCache()
    with torch.no_grad():
        logits = eager(torch.tensor([prompt]), past_key_values=cache).logits[0, -1]
        # A copy of a layer's tensors: the cache goes on.
        entries = [(layer.keys[0].clone(), layer.values[0].clone()) for layer in cache.layers]
        more = eager(torch.tensor([later]), past_key_values=cache).logits[0]
    evaluated, backbone = HFModel(folder, CPU, torch.float32), Backbone(str(folder), CPU, torch.float32)
    inspected = InspectedModel(folder, tokenizer)
    close = dict(atol=1e-4, rtol=1e-4)
    for model in (evaluated, inspected, backbone):
        layers, last = model.prefill(prompt)
        for ours, theirs in zip(Layers.of(layers), entries, strict=True):
            for mine, own in zip(ours, theirs, strict=True):
                torch.testing.assert_close(mine, own, **close)
        torch.testing.assert_close(last, logits, **close)
    batch = Batch(evaluated, [layers] * 2, LATER_TOKENS)
    for row in batch.extend(torch.tensor([later] * 2), PROMPT_TOKENS):
        torch.testing.assert_close(row, more, **close)
    rows, seen = backbone.rows(backbone.tensor(later), Layers.of(layers), logits=True)
    torch.testing.assert_close(rows, more, **close)
    torch.testing.assert_close(seen[1][0], cache.layers[1].keys[0], **close)
    score = inspected.answer(layers, PROMPT_TOKENS, last, 1, later).score
    logprobs = torch.cat([logits[None], more[:-1]]).log_softmax(-1)
    assert score == pytest.approx(logprobs[range(LATER_TOKENS), later].mean().item(), abs=1e-4)


def test_greedy_answers_are_those_of_transformers(folder, document_ids, tokenizer):
    """Of prompts of different lengths in one batch, and as inspection and training ask for them."""
    evaluated, backbone = HFModel(folder, CPU, torch.float32), Backbone(str(folder), CPU, torch.float32)
    eager = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    ids = document_ids[:40]
    whole = eager.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)[0, len(ids) :].tolist()
    layers, last = evaluated.prefill(ids)
    shorter = [LayerKV(kv.key[:20], kv.value[:20]) for kv in layers]
    first = int(last.argmax())
    answers = generate(Batch(evaluated, [shorter, layers], 6), [first, first], len(ids), 6)
    assert answers[1] == whole != answers[0]
    assert InspectedModel(folder, tokenizer).answer(layers, len(ids), last, 6, None).ids == whole
    context = Layers.of(backbone.prefill(ids[:-3]).layers)
    assert backbone.answers(context, [ids[-3:], ids[-1:], ids[-3:]], 6)[::2] == [whole, whole]


def test_the_shape_is_that_of_the_loaded_model(folder):
    model = HFModel(folder, CPU, torch.float32)
    groups = 4 if folder.name == "GPTNeoX" else 2
    assert read_shape(folder) == model.shape == ModelShape(str(folder), 49152, 48, 2, 4, groups, 12)
    assert model.prefill([5, 6, 7]).layers[1].key.shape == (3, groups, 12)


def test_gradients_reach_embeddings_and_never_weights(folder):
    model = HFModel(folder, CPU, torch.float32)
    context = Layers.of(model.prefill([5, 6, 7]).layers)
    soft = torch.randn(2, 48, requires_grad=True)
    hidden, _ = Backbone(str(folder), CPU, torch.float32).rows(soft, context)
    hidden.square().sum().backward()
    assert soft.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in model.model.parameters())


@pytest.mark.parametrize(
    ("name", "sizes", "words"),
    [
        ("Gemma2", GROUPED, "layer 0 has softcap"),
        ("Llama4Text", GROUPED | CHUNKED, "it has layers of kind .*chunked_attention"),
        ("Olmo3", GROUPED | ALL_WINDOWS, "no layer sees all tokens, so that there is nothing to choose"),
        ("Gemma2", GROUPED | dict(layer_types=["full_attention"] * 2), "layer 0 has softcap"),
        ("Mistral", GROUPED | dict(sliding_window=9), "layer 0 has sliding_window 9, its configuration says None"),
        (
            "GptOss",
            GROUPED | dict(layer_types=["full_attention"] * 2, num_local_experts=2, num_experts_per_tok=1),
            "layer 0 has s_aux",
        ),
        ("Bloom", dict(vocab_size=49152, hidden_size=48, n_layer=2, n_head=4), "0 such layers found, 2 expected"),
    ],
)
def test_a_model_without_plain_causal_attention_is_refused(make_model, name, sizes, words):
    folder = make_model(name, **sizes)
    with pytest.raises(ValueError, match=f"model path: '{folder}'.*{words}"):
        HFModel(folder, CPU, torch.float32).prefill([5, 6, 7])


def test_a_model_without_attention_is_refused_by_its_configuration(tmp_path):
    transformers.MambaConfig(vocab_size=49152, hidden_size=48, num_hidden_layers=2).save_pretrained(tmp_path)
    for read in (read_shape, lambda folder: HFModel(folder, CPU, torch.float32)):
        with pytest.raises(ValueError, match=f"model path: '{tmp_path}' .MambaConfig. has no plain attention heads"):
            read(tmp_path)


def test_what_cannot_be_loaded_is_named(make_model, tmp_path):
    folder = make_model("Llama", **GROUPED)
    with pytest.raises(ValueError, match=f"model path: '{tmp_path}' holds no Hugging Face model"):
        HFModel(tmp_path, CPU, torch.float32)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"model path: '{folder}' cannot be loaded"):
        HFModel(folder, CPU, torch.float32)
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.raises(ValueError, match=f"model path: '{folder}' has no tokenizer that can be loaded"):
        HFModel(folder, CPU, torch.float32)


def test_near_the_longest_text_the_probe_slides_back(make_model, document_ids):
    """GPT-2 has a table of positions: a probe past its end would be an error."""
    folder = make_model("GPT2", vocab_size=49152, n_embd=48, n_layer=2, n_head=4, n_positions=640)
    model, config = HFModel(folder, CPU, torch.float32), MetaSoftConfig()
    ids = document_ids[:636]
    plan = plan_span(config, prompt_tokens=len(ids), page_size=1)
    method = load_method("metasoft")(config, model.shape, model.embed, CPU)
    probe = probe_of(model, ids, plan, method)
    assert probe.first_position + len(probe.embeds) > 640
    ((_, (routes, merged)),) = compress(model, model.prefill(ids).layers, probe, [plan], method)
    assert routes.kept.shape == (4, plan.kept_slots) and merged.value.isfinite().all()


@pytest.mark.parametrize(
    ("name", "sizes", "turnings", "is_neox"),
    [
        ("Llama", {}, "rr", True),
        ("Glm4", dict(head_dim=12, pad_token_id=0), "rr", False),  # half of each, neighbors turn together
        ("Cohere", {}, "rr", False),
        ("SmolLM3", dict(no_rope_layers=[1, 0], pad_token_id=0), "rn", True),
        ("Ministral3", dict(head_dim=12, rope_parameters=YARN, max_position_embeddings=4096), "oo", None),
        ("Phi3", dict(rope_parameters=LONG_ROPE, max_position_embeddings=4096, pad_token_id=0), "rr", True),
        ("Gemma3Text", WINDOWED["Gemma3Text"], "rr", True),
        ("Cohere2", WINDOWED["Cohere2"], "rn", False),
        ("Olmo3", WINDOWED["Olmo3"], "rr", True),
        ("Exaone4", WINDOWED["Exaone4"], "rn", True),
        ("GPT2", {}, "oo", None),  # a table of positions is added to the embeddings
    ],
)
def test_how_positions_turn_queries_is_seen(make_model, name, sizes, turnings, is_neox):
    layers = HFModel(make_model(name, **SIZES | sizes), CPU, torch.float32).layers()
    assert "".join(layer.turning.value[0] for layer in layers) == turnings
    assert [layer.rope is not None for layer in layers] == [letter == "r" for letter in turnings]
    if is_neox is not None:
        assert layers[0].rope.is_neox is is_neox


def test_directions_are_right_past_the_end_of_the_short_texts(make_model):
    """With LongRoPE other frequencies turn the queries of long prompts, and the bias has to turn with them."""
    sizes = SIZES | dict(rope_parameters=LONG_ROPE, max_position_embeddings=4096, pad_token_id=0)
    model = HFModel(make_model("Phi3", **sizes), CPU, torch.float32)
    table = model.layers()[0].rope.cos_sin
    rotary, empty = model.model.get_decoder().rotary_emb, torch.empty(1)
    for start, end in ((0, 1500), (3000, 4096)):
        cos, sin = rotary(empty, torch.arange(end)[None])
        half = cos.shape[-1] // 2
        expected = torch.cat([cos[0, start:, :half], sin[0, start:, :half]], -1)
        torch.testing.assert_close(table[start:end], expected, atol=1e-5, rtol=1e-5)
