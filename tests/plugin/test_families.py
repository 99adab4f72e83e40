"""Every class of SGLang's registry has its verdict; and what is refused is refused from the configuration alone."""

import ast
import json
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers
from metasoft_patches import compat, families
from metasoft_patches.doctor.command import main
from metasoft_patches.families import BY_CLASS, FAMILIES, Verdict
from sglang.srt.configs.model_config import ModelConfig

from tests.tiny_models import MODELS

SIZES = dict(vocab_size=1000, hidden_size=48, num_hidden_layers=4, num_attention_heads=4)


def registered_classes() -> set[str]:
    """Names in the ``EntryClass`` of each of SGLang's model files, read from their source."""
    found = set()
    for file in Path(find_spec("sglang.srt.models").submodule_search_locations[0]).glob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8-sig")).body:
            if isinstance(node, ast.Assign) and any(getattr(name, "id", "") == "EntryClass" for name in node.targets):
                entries = node.value.elts if isinstance(node.value, ast.List | ast.Tuple) else [node.value]
                found |= {ast.unparse(entry) for entry in entries}
    return found


def test_every_class_of_the_registry_has_one_verdict():
    registered = registered_classes()
    assert len(registered) > 200 and not registered - BY_CLASS.keys()
    if version("sglang") == compat.SUPPORTED_SGLANG[0]:
        assert not BY_CLASS.keys() - registered
    assert len(BY_CLASS) == sum(len(family.classes.split()) for family in FAMILIES), "a class is named twice"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_verdict_has_its_words(family):
    assert bool(family.words) == (family.verdict is not Verdict.SERVED)
    if family.unless is not None:
        assert bool(family.unless.why) == (family.verdict is not Verdict.REFUSED)
    assert not (family.is_tried and family.verdict is Verdict.REFUSED)


def test_what_is_said_to_be_tried_is_a_tiny_model():
    tried = {family.name for family in FAMILIES if family.is_tried}
    run = [tiny for tiny in MODELS.values() if tiny.is_run]
    assert tried == {(BY_CLASS.get(tiny.served_by) or BY_CLASS[tiny.class_name]).name for tiny in run}


def model_of(tmp_path, config, architecture: str) -> ModelConfig:
    config.architectures = [architecture]
    config.save_pretrained(tmp_path)
    return ModelConfig(str(tmp_path))


def refused(model: ModelConfig) -> list[str]:
    """What is said of a model on a server with nothing unusual."""
    args = SimpleNamespace(kv_cache_dtype="auto", device="cpu")
    of_model = [refusal for refusal in compat.REFUSED if refusal.setting == compat.MODEL]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compat, "REFUSED", of_model)
        return [f"{refusal.feature}: {refusal.why}" for refusal in compat.refusals(args, model)]


@pytest.mark.parametrize(
    ("name", "sizes", "words"),
    [
        ("Mistral", dict(sliding_window=256), None),  # O1: SGLang's class ignores it
        ("Phi3", dict(sliding_window=2047, pad_token_id=0), None),
        ("Starcoder2", dict(sliding_window=128), None),
        ("Qwen2Moe", {}, None),
        ("Olmo2", {}, None),
        ("Cohere", {}, None),
        ("GraniteMoeHybrid", dict(hidden_size=64, layer_types=["attention"] * 4), None),
        ("GraniteMoeHybrid", dict(hidden_size=64, layer_types=["mamba"] * 3 + ["attention"]), families.RECURRENT),
        ("Gemma2", dict(head_dim=12), families.CAPPED),
        ("Gemma3Text", dict(head_dim=12), None),
        ("Cohere2", dict(layer_types=["sliding_attention"] * 3 + ["full_attention"]), None),
        ("Laguna", {}, families.WINDOWS),
        ("GptOss", dict(head_dim=12), families.SINKS),
        ("Qwen3Next", {}, families.RECURRENT),
        ("FalconH1", {}, families.RECURRENT),
        ("Lfm2", {}, families.RECURRENT),
        ("SmolLM3", dict(pad_token_id=0), families.FALLBACK),
    ],
    ids=str,
)  # fmt: skip
def test_a_configuration_is_served_or_refused_by_its_class(tmp_path, name, sizes, words):
    architecture = f"{name.removesuffix('Text')}ForCausalLM"
    said = refused(model_of(tmp_path, getattr(transformers, f"{name}Config")(**SIZES | sizes), architecture))
    assert said == ([] if words is None else [f"model class {architecture}: {words}"])


@pytest.mark.parametrize(
    ("name", "sizes", "window"),
    [
        ("Gemma3Text", dict(head_dim=12, sliding_window=512), 512),
        ("Cohere2", dict(sliding_window=256), 257),  # as SGLang counts
        ("Exaone4", dict(sliding_window=128, sliding_window_pattern=4), 128),
        ("Exaone4", dict(sliding_window=None, layer_types=["full_attention"] * 4), None),
        ("Mistral", dict(sliding_window=256), None),  # whose class in SGLang ignores it
        ("Olmo2", {}, None),
    ],
    ids=str,
)
def test_windows_are_known_before_the_weights(tmp_path, name, sizes, window):
    architecture = f"{name.removesuffix('Text')}ForCausalLM"
    model = model_of(tmp_path, getattr(transformers, f"{name}Config")(**SIZES | sizes), architecture)
    assert families.longest_window(model) == window
    said = f"a span keeps {(window or 1) - 1:,} entries at the least"
    assert (said in families.verdict_on(model)) is (window is not None)


def test_a_vision_model_run_with_one_position_a_token_is_not_refused():
    model = SimpleNamespace(
        hf_config=SimpleNamespace(architectures=["Qwen3VLForConditionalGeneration"]),
        model_impl="auto", model_is_mrope=True,
    )  # fmt: skip
    assert families.why_refused(model) == families.POSITIONS_3D
    model.model_is_mrope = False
    assert families.why_refused(model) is None and "language_model_only" in families.verdict_on(model)


def test_a_class_from_elsewhere_is_left_to_the_self_test(monkeypatch):
    model = SimpleNamespace(hf_config=SimpleNamespace(architectures=["OurOwnForCausalLM"]), model_impl="auto")
    assert families.why_refused(model) == families.FALLBACK
    monkeypatch.setenv(families.EXTERNAL, "our.models")
    assert families.why_refused(model) is None and "the self-test at start decides" in families.verdict_on(model)
    model.model_impl = "transformers"
    assert families.why_refused(model) == families.FALLBACK


@pytest.mark.parametrize(
    ("backend", "dtype", "is_refused"),
    [("hpc_ops", "fp8_e4m3", True), ("hpc_ops", "auto", False), ("fa3", "fp8_e4m3", False)],
)
def test_a_backend_that_layers_ask_once_is_refused(backend, dtype, is_refused):
    """Hunyuan 3 remembers whether the first backend it saw stores FP8 entries itself."""
    (row,) = [refusal for refusal in compat.REFUSED if "HPC-Ops" in refusal.feature]
    for names in (("attention_backend",), ("prefill_attention_backend",), ("decode_attention_backend",)):
        args = SimpleNamespace(
            attention_backend=None, prefill_attention_backend=None, decode_attention_backend=None, kv_cache_dtype=dtype
        )
        for name in names:
            setattr(args, name, backend)
        assert row.is_on(args, None) is is_refused


def said_by_doctor(capsys, folder) -> tuple[int, dict]:
    code = main([str(folder), "--json"])
    return code, {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}


@pytest.mark.parametrize(
    ("name", "sizes", "status", "words"),
    [
        ("Qwen3", {}, "ok", "Qwen3ForCausalLM is served: a tiny model of it runs in the tests"),
        ("Arcee", {}, "ok", "ArceeForCausalLM is served: the self-test at start decides"),
        ("Mixtral", {}, "ok", "MixtralForCausalLM is served: the self-test at start decides"),
        ("Gemma2", dict(head_dim=12), "problem", f"model class Gemma2ForCausalLM is refused: {families.CAPPED}"),
        ("Qwen3Next", {}, "problem", f"model class Qwen3NextForCausalLM is refused: {families.RECURRENT}"),
        ("Mamba", {}, "problem", f"model class MambaForCausalLM is refused: {families.RECURRENT}"),
    ],
    ids=str,
)
def test_doctor_says_it_from_the_configuration_alone(tmp_path, capsys, name, sizes, status, words):
    config = getattr(transformers, f"{name}Config")(**(SIZES if name != "Mamba" else {}) | sizes)
    config.architectures = [f"{name}ForCausalLM"]
    config.save_pretrained(tmp_path)
    code, checks = said_by_doctor(capsys, tmp_path)
    assert (checks["family"]["status"], checks["family"]["found"]) == (status, words)
    assert code == (status == "problem")
