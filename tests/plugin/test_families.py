"""Every class of SGLang's registry has its verdict; and what is refused is refused from the configuration alone."""

import ast
import json
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import sglang.srt.plugins as plugins
import transformers
from metasoft_patches import compat, families, window_backends
from metasoft_patches.doctor.command import main
from metasoft_patches.families import BY_CLASS, FAMILIES, Verdict
from sglang.srt.configs.model_config import ModelConfig

from tests.tiny_models import MODELS

plugins.load_plugins()

from sglang.srt.entrypoints.engine import Engine  # noqa: E402
from sglang.srt.server_args import prepare_server_args  # noqa: E402

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
    ("name", "words"),
    [
        ("DeepseekV3ForCausalLM", families.LATENT),
        ("KimiK25ForConditionalGeneration", families.LATENT),
        ("DeepseekV32ForCausalLM", families.LATENT),  # and DSA
        ("GlmMoeDsaForCausalLM", families.LATENT),
        ("Llama4ForConditionalGeneration", families.CHUNKS),
        ("Gemma2ForCausalLM", families.CAPPED),
        ("Grok1ForCausalLM", families.CAPPED),
        ("Qwen3NextForCausalLM", families.RECURRENT),
        ("Qwen3_5ForConditionalGeneration", families.RECURRENT),
        ("NemotronHForCausalLM", families.RECURRENT),
        ("MiniMaxM3SparseForCausalLM", families.SPARSE),
        ("DeepseekV4ForCausalLM", families.SPARSE),
        ("TransformersForCausalLM", families.FALLBACK),
    ],
)
@pytest.mark.parametrize("how", ["flags", "engine", "doctor"])
def test_what_stays_refused_is_named_before_sglang_settles_anything_for_it(tmp_path, capsys, name, words, how):
    """From a file with a name and nothing else: no weights, no sizes, and some that SGLang settles on a GPU alone."""
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [name]}))
    if how == "doctor":
        assert said_by_doctor(capsys, tmp_path)[1]["family"]["found"] == f"model class {name} is refused: {words}"
        return
    start = {
        "flags": lambda: prepare_server_args(["--model-path", str(tmp_path), "--enable-metasoft"]),
        "engine": lambda: Engine.server_args_class(model_path=str(tmp_path), enable_metasoft=True),
    }[how]
    with pytest.raises(ValueError) as error:
        start()
    assert str(error.value) == f"--enable-metasoft cannot run with model class {name} (--model-path): {words}"


def test_a_class_without_one_of_sglangs_own_is_refused(tmp_path):
    """Its file names a class that only transformers has."""
    config = transformers.SmolLM3Config(**SIZES, pad_token_id=0)
    (said,) = refused(model_of(tmp_path, config, "SmolLM3ForCausalLM"))
    assert said == f"model class SmolLM3ForCausalLM: {families.FALLBACK}"


def test_a_served_class_or_none_is_no_reason_to_refuse(tmp_path):
    assert families.refused_in_file("no/such/model/at/all") is families.refused_in_file(str(tmp_path)) is None
    for text in ("{", "[]", "{}", '{"architectures": []}', '{"architectures": ["Qwen3ForCausalLM"]}'):
        (tmp_path / "config.json").write_text(text)
        assert families.refused_in_file(str(tmp_path)) is None


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


def methods_of_classes() -> dict[str, set[str]]:
    """Of each class in SGLang's model files its methods, and those of its bases in the same file, from their source."""
    found: dict[str, set[str]] = {}
    for file in Path(find_spec("sglang.srt.models").submodule_search_locations[0]).glob("*.py"):
        in_file: dict[str, set[str]] = {}
        for node in ast.parse(file.read_text(encoding="utf-8-sig")).body:
            if isinstance(node, ast.ClassDef):
                names = {each.name for each in node.body if isinstance(each, ast.FunctionDef)}
                in_file[node.name] = names.union(*(in_file.get(ast.unparse(base), set()) for base in node.bases))
        found |= {name: methods for name, methods in in_file.items() if name in BY_CLASS}
    return found


def test_which_classes_with_windows_tell_attention_backends_nothing():
    methods = methods_of_classes()
    windowed = {name for name, family in BY_CLASS.items() if family.window_more is not None and name in methods}
    silent = {name for name in windowed if "get_attention_sliding_window_size" not in methods[name]}
    assert len(windowed) > 8 and silent == window_backends.WITHOUT_PLAN & methods.keys()


@pytest.mark.parametrize(
    ("name", "sizes", "backend", "is_refused"),
    [
        ("Cohere2", dict(sliding_window=256), "flashinfer", True),  # an Ampere GPU's default
        ("Cohere2", dict(sliding_window=256), "triton", True),
        ("Cohere2", dict(sliding_window=256), "fa3", False),
        ("Cohere2", dict(layer_types=["full_attention"] * 4), "flashinfer", False),
        ("Gemma3Text", dict(head_dim=12), "flashinfer", False),
        ("Gemma3Text", dict(head_dim=12), "flex_attention", True),
        ("Qwen3", {}, "flex_attention", False),
    ],
    ids=str,
)
def test_a_backend_in_which_windows_are_none_is_refused(tmp_path, name, sizes, backend, is_refused):
    (row,) = [refusal for refusal in compat.REFUSED if "keep the model's sliding windows" in refusal.feature]
    architecture = f"{name.removesuffix('Text')}ForCausalLM"
    model = model_of(tmp_path, getattr(transformers, f"{name}Config")(**SIZES | sizes), architecture)
    args = SimpleNamespace(attention_backend="fa3", prefill_attention_backend=None, decode_attention_backend=backend)
    assert row.is_on(args, model) is is_refused


@pytest.mark.parametrize("name", ["Qwen2VL", "Qwen2_5_VL", "Qwen3VL", "Qwen3VLMoe", "Glm4v", "Glm4vMoe"])
def test_a_model_with_three_positions_a_token_is_served_for_texts(tmp_path, name):
    model = model_of(tmp_path, getattr(transformers, f"{name}Config")(), f"{name}ForConditionalGeneration")
    model.model_is_mrope = True  # as its released checkpoints say
    assert refused(model) == [] and families.TEXT_3D in families.verdict_on(model)


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
