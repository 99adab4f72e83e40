"""Which of SGLang's model classes are served, with what differences, or refused and why: one table, by class name.

The start-up check, ``doctor`` and the table in docs/support.md are made from it; a test holds it against SGLang's
registry. What a class does may depend on its configuration too, as ``unless`` says; and what the table promises is
asked of the loaded model once more, at every start (``forward/self_test.py``).
"""

import enum
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import try_to_load_from_cache


class Verdict(enum.StrEnum):
    """What becomes of a family."""

    SERVED = "served"
    DIFFERENT = "served, with differences"
    REFUSED = "refused"


class Family(NamedTuple):
    """Model classes that are alike in what matters here."""

    name: str
    classes: str  # with spaces between
    verdict: Verdict
    words: str = ""  # the differences, or why it is refused
    unless: "Unlike | None" = None  # which configurations are no such thing
    is_tried: bool = False  # a tiny model of it runs in the tests
    window_more: int | None = None  # what SGLang adds to a window's tokens; None: classes ignore windows, or have none


class Unlike(NamedTuple):
    """Configurations of a family that are refused though it is served, or served though it is refused."""

    condition: str  # in words
    holds: Callable[[Any], bool]  # of SGLang's ``ModelConfig``
    why: str = ""  # it is refused


def _skips_layers(model: Any) -> bool:
    return any(block.attention.no_op for block in _text(model, "block_configs") or ())


def _text(model: Any, name: str) -> Any:
    return getattr(model.hf_text_config, name, None)


WINDOWS = "layers with a sliding window have a KV pool of their own"
SINKS = "layers with a sliding window have a KV pool of their own, and attention sinks of the model's own are not known"
OWN_SINKS = "attention sinks of the model's own are not known"
LATENT = "with latent attention (MLA) there are no per-head keys and values"
RECURRENT = "most layers are recurrent (linear attention or state space): they hold no entries to drop"
SPARSE = "its sparse attention keeps an index of blocks of entries, which would have to move with them"
UNEQUAL = "a tiny model of it did not answer as transformers does, and it is not known why"
CHUNKS = "layers that attend within chunks count them by entries, which are fewer after a compression"
CAPPED = "layers cap their logits, which probes do not"
SHARED = "layers share keys and values, or add embeddings of their own"
OWN_POSITIONS = "positions of what it decodes are those of an image that it makes"
DRAFT = "it is a draft model of speculative decoding, which is refused"
NOT_CAUSAL = "its attention is not causal"
CROSS = "cross attention has a cache of its own"
NO_DECODING = "it does not generate: there is nothing to decode"
FALLBACK = "it has no class of SGLang's own and runs by transformers, whose layers are not known"
GAPS = "layers without attention are not known"
LOOPS = "a layer's attention runs several times with different windows"
NO_BIAS = "keys carry no bias (`key_bias`) where a position does more to a query than to turn it: entries are dropped"
TEXT = "text prompts; a prompt with an image or sound stays uncompressed"
TEXT_3D = f"{TEXT}, and so do a chat's turns from there on"

WITH_MAMBA = Unlike("it has Mamba layers", lambda model: "mamba" in (_text(model, "layer_types") or ()), RECURRENT)
WITH_SPARSE = Unlike("it has sparse attention", lambda model: bool(_text(model, "sparse_config")), SPARSE)
WITH_LATENT = Unlike("its text model has MLA", lambda model: bool(_text(model, "kv_lora_rank")), LATENT)
WITH_GAPS = Unlike("some of its layers have no attention", _skips_layers, GAPS)

SERVED, DIFFERENT, REFUSED = Verdict.SERVED, Verdict.DIFFERENT, Verdict.REFUSED

FAMILIES = (
    Family(
        "Llama 2 and 3, Yi, R1-Distill, Phi-3, Phi-4, InternLM 3",
        "LlamaForCausalLM Phi3ForCausalLM InternLM3ForCausalLM IQuestCoderForCausalLM TorchNativeLlamaForCausalLM "
        "TorchNativePhi3ForCausalLM",
        SERVED,
        is_tried=True,
    ),
    Family("Qwen2, Qwen2.5, QwQ, MiMo", "Qwen2ForCausalLM MiMoForCausalLM", SERVED, is_tried=True),
    Family("Qwen1.5-MoE, Qwen2-MoE", "Qwen2MoeForCausalLM", SERVED),
    Family("Qwen3", "Qwen3ForCausalLM", SERVED, is_tried=True),
    Family("Qwen3-MoE, Qwen3-Coder", "Qwen3MoeForCausalLM", SERVED, is_tried=True),
    Family("GLM-4", "Glm4ForCausalLM", SERVED, is_tried=True),
    Family("GLM-4.5 to 4.7", "Glm4MoeForCausalLM", SERVED, is_tried=True),
    Family("MiniMax-M2", "MiniMaxM2ForCausalLM", SERVED, is_tried=True),
    Family("Mistral 7B, Nemo, Ministral-8B, Mistral Small (text)", "MistralForCausalLM", SERVED, is_tried=True),
    Family("Mistral Small 3.1 and 3.2, Magistral", "Mistral3ForConditionalGeneration", DIFFERENT, TEXT, is_tried=True),
    Family("Ministral 3, Devstral 2", "Ministral3ForCausalLM", DIFFERENT, NO_BIAS, is_tried=True),
    Family("Granite 3", "GraniteForCausalLM", SERVED, is_tried=True),
    Family("Granite MoE", "GraniteMoeForCausalLM GraniteMoeSharedForCausalLM", SERVED),
    Family("Granite 4 without Mamba layers", "GraniteMoeHybridForCausalLM", SERVED, "", WITH_MAMBA, is_tried=True),
    Family("OLMo 2, OLMo 3", "Olmo2ForCausalLM", SERVED, is_tried=True, window_more=0),
    Family("Hunyuan v1 (A13B, 7B)", "HunYuanDenseV1ForCausalLM HunYuanMoEV1ForCausalLM", DIFFERENT, NO_BIAS),
    Family("Hunyuan 3", "HYV3ForCausalLM", SERVED, is_tried=True),
    Family("Command-R", "CohereForCausalLM", SERVED, is_tried=True),
    Family("StarCoder2", "Starcoder2ForCausalLM", SERVED, is_tried=True),
    Family("Llama 4, text only", "Llama4ForCausalLM", REFUSED, UNEQUAL),
    Family("Gemma 3 (text)", "Gemma3ForCausalLM", SERVED, is_tried=True, window_more=0),
    Family("Gemma 3", "Gemma3ForConditionalGeneration", DIFFERENT, TEXT, window_more=0),
    Family("EXAONE 4", "Exaone4ForCausalLM", SERVED, is_tried=True, window_more=0),
    Family("EXAONE MoE", "ExaoneMoEForCausalLM ExaoneMoeForCausalLM", SERVED, window_more=1),
    Family(
        "Command-A, Command-R7B",
        "Cohere2ForCausalLM",
        SERVED,
        is_tried=True,
        window_more=1,
    ),
    Family("Command-A with experts", "Cohere2MoeForCausalLM", SERVED, window_more=1),
    Family(
        "Command-A Vision",
        "Cohere2VisionForConditionalGeneration",
        DIFFERENT,
        TEXT,
        window_more=1,
    ),
    Family("AFMoE, Spark 2.5", "AfmoeForCausalLM Spark2_5ForCausalLM", SERVED, window_more=0),
    Family("Mixtral, PhiMoE", "MixtralForCausalLM QuantMixtralForCausalLM PhiMoEForCausalLM", SERVED),
    Family("OLMo, OLMoE", "OlmoForCausalLM OlmoeForCausalLM", SERVED),
    Family("ERNIE 4.5 (text)", "Ernie4_5_ForCausalLM Ernie4_5_MoeForCausalLM", SERVED),
    Family("Ling and Ring, v1 and v2", "BailingMoEForCausalLM BailingMoeForCausalLM BailingMoeV2ForCausalLM", SERVED),
    Family("ChatGLM, InternLM 2, Qwen 1", "ChatGLMModel InternLM2ForCausalLM QWenLMHeadModel", SERVED),
    Family(
        "other dense models",
        "ApertusForCausalLM ArceeForCausalLM BaichuanForCausalLM DbrxForCausalLM ExaoneForCausalLM "
        "GemmaForCausalLM GPTJForCausalLM MiniCPMForCausalLM NanbeigeForCausalLM OrionForCausalLM "
        "PersimmonForCausalLM PhiForCausalLM Phi3SmallForCausalLM SolarForCausalLM StableLmForCausalLM "
        "TeleFLMForCausalLM XllmForCausalLM K2HorizonForCausalLM XverseForCausalLM",
        SERVED,
        "",
        WITH_SPARSE,
    ),
    Family("Nemotron by architecture search", "DeciLMForCausalLM", SERVED, "", WITH_GAPS),
    Family("other experts", "DeepseekForCausalLM SarvamMoEForCausalLM XverseMoeForCausalLM", SERVED),
    Family(
        "with a table of positions",
        "GPT2LMHeadModel GPTBigCodeForCausalLM OPTForCausalLM",
        DIFFERENT,
        NO_BIAS,
        is_tried=True,
    ),
    Family(
        "InternVL and other vision and speech models of one position a token",
        "InternVLChatModel InternS1ForConditionalGeneration LlavaForConditionalGeneration LlavaLlamaForCausalLM "
        "LlavaMistralForCausalLM LlavaQwenForCausalLM LlavaVidForCausalLM YiVLForCausalLM MultiModalityCausalLM "
        "NVILAForConditionalGeneration NVILALiteForConditionalGeneration LightOnOCRForConditionalGeneration "
        "LocateAnythingForConditionalGeneration MiniCPMV MiniCPMO Phi4MMForCausalLM POINTSV15ChatModel "
        "Qwen2AudioForConditionalGeneration Qwen3ASRForConditionalGeneration GlmAsrForConditionalGeneration "
        "VoxtralForConditionalGeneration Sarashina2VisionForCausalLM DotsOCRForCausalLM "
        "Step3VLForConditionalGeneration StepVLForConditionalGeneration DeepseekOCRForCausalLM "
        "PixtralForConditionalGeneration",
        DIFFERENT,
        TEXT,
        WITH_LATENT,
    ),
    Family("Qwen2-VL", "Qwen2VLForConditionalGeneration", DIFFERENT, TEXT_3D, is_tried=True),
    Family("Qwen2.5-VL", "Qwen2_5_VLForConditionalGeneration", DIFFERENT, TEXT_3D, is_tried=True),
    Family("Qwen3-VL", "Qwen3VLForConditionalGeneration", DIFFERENT, TEXT_3D, is_tried=True),
    Family("GLM-4.1V", "Glm4vForConditionalGeneration", DIFFERENT, TEXT_3D, is_tried=True),
    Family(
        "Qwen3-VL-MoE, Qwen3-Omni, GLM-4.5V, GLM-4.6V and others with M-RoPE",
        "Qwen3VLMoeForConditionalGeneration Qwen3OmniMoeForConditionalGeneration Glm4vMoeForConditionalGeneration "
        "GlmOcrForConditionalGeneration Ernie4_5_VLMoeForConditionalGeneration PaddleOCRVLForConditionalGeneration "
        "MiDashengLMModel BailingMMNativeForConditionalGeneration BailingMM2NativeForConditionalGeneration "
        "InternS1ProForConditionalGeneration Cosmos3ForConditionalGeneration Cosmos3EdgeForConditionalGeneration",
        DIFFERENT,
        TEXT_3D,
    ),
    Family("GLM-Image", "GlmImageForConditionalGeneration", REFUSED, OWN_POSITIONS),
    Family("Gemma 2", "Gemma2ForCausalLM", REFUSED, CAPPED),
    Family("Gemma 3n", "Gemma3nForCausalLM Gemma3nForConditionalGeneration", REFUSED, SHARED),
    Family(
        "Gemma 4",
        "Gemma4ForCausalLM Gemma4ForConditionalGeneration Gemma4UnifiedForConditionalGeneration",
        REFUSED,
        WINDOWS,
    ),
    Family("gpt-oss", "GptOssForCausalLM", REFUSED, SINKS),
    Family("Granite with windows", "GraniteSWAForCausalLM GraniteMoeSWAForCausalLM", REFUSED, SINKS),
    Family("IQuest Q1", "IQuestQ1ForCausalLM", REFUSED, OWN_SINKS),
    Family("MiMo-V2", "MiMoV2ForCausalLM MiMoV2FlashForCausalLM MiMoV2ASRForCausalLM", REFUSED, SINKS),
    Family("Step-3.5, Step-3.7", "Step3p5ForCausalLM Step3p7ForConditionalGeneration", REFUSED, WINDOWS),
    Family(
        "others with windows",
        "BeamForCausalLM LagunaForCausalLM MellumForCausalLM MuseGlimmerForCausalLM "
        "MuseGlimmerForConditionalGeneration MuseSparkForConditionalGeneration UnlimitedOCRForCausalLM",
        REFUSED,
        WINDOWS,
    ),
    Family("IQuest Loop-Coder", "IQuestLoopCoderForCausalLM", REFUSED, LOOPS),
    Family("Llama 4", "Llama4ForConditionalGeneration", REFUSED, CHUNKS),
    Family("Grok", "Grok1ForCausalLM Grok1ModelForCausalLM", REFUSED, CAPPED),
    Family(
        "DeepSeek V2 and V3, Kimi K2, GLM-4.7-Flash, GLM-5 and others with MLA",
        "DeepseekV2ForCausalLM DeepseekV3ForCausalLM DeepseekV32ForCausalLM DeepseekVL2ForCausalLM "
        "Glm4MoeLiteForCausalLM GlmMoeDsaForCausalLM Glm5NextForConditionalGeneration LongcatFlashForCausalLM "
        "HYV4ForCausalLM Dots3NoteForCausalLM DotsVLMForCausalLM MistralLarge3ForCausalLM "
        "KimiK25ForConditionalGeneration KimiVLForConditionalGeneration KimiLinearForCausalLM "
        "KimiK3ForConditionalGeneration KimiK3LinearForCausalLM BailingMoeV2_5ForCausalLM BailingMoeV3ForCausalLM "
        "BailingMoeV3VLForConditionalGeneration MiniCPM3ForCausalLM SarvamMLAForCausalLM GigaChat35ForCausalLM",
        REFUSED,
        LATENT,
    ),
    Family(
        "Qwen3-Next, Qwen3.5 and later, Nemotron-H, Falcon-H1, LFM2 and other hybrids",
        "Qwen3NextForCausalLM Qwen3_5ForCausalLM Qwen3_5MoeForCausalLM Qwen3_5ForConditionalGeneration "
        "Qwen3_5MoeForConditionalGeneration Qwen4ExpForConditionalGeneration JetNemotronForCausalLM "
        "JetVLMForConditionalGeneration NemotronHForCausalLM NemotronHPuzzleForCausalLM NemotronH_Nano_VL_V2 "
        "NemotronH_Nano_Omni_Reasoning_V3 NemotronH_Omni_Reasoning_V3 FalconH1ForCausalLM FalconMambaForCausalLM "
        "MambaForCausalLM Mamba2ForCausalLM Lfm2ForCausalLM Lfm2MoeForCausalLM Lfm2VlForConditionalGeneration "
        "ZayaForCausalLM InklingForConditionalGeneration InternS2PreviewForConditionalGeneration "
        "InternS2MobiusForConditionalGeneration MiniCPMSALAForCausalLM MiniCPMV4_6ForConditionalGeneration "
        "MiniCPMV4_7ForConditionalGeneration",
        REFUSED,
        RECURRENT,
    ),
    Family(
        "MiniMax-M3, DeepSeek V4",
        "MiniMaxM3SparseForCausalLM MiniMaxM3SparseForConditionalGeneration DeepseekV4ForCausalLM",
        REFUSED,
        SPARSE,
    ),
    Family(
        "diffusion and prefix language models",
        "LLaDA2MoeModelLM SDARForCausalLM SDARMoeForCausalLM DiffusionGemmaForBlockDiffusion HrmTextForCausalLM",
        REFUSED,
        NOT_CAUSAL,
    ),
    Family(
        "encoder-decoder models",
        "WhisperForConditionalGeneration MllamaForConditionalGeneration MossVLForConditionalGeneration",
        REFUSED,
        CROSS,
    ),
    Family(
        "embedding, reward and classification models",
        "BertModel Contriever BertForSequenceClassification XLMRobertaModel XLMRobertaForSequenceClassification "
        "CLIPModel EmbeddingGemmaModel EmbeddingGemma2Model Gemma2ForSequenceClassification InternLM2ForRewardModel "
        "LlamaEmbeddingModel LlamaForClassification LlamaForSequenceClassification "
        "LlamaForSequenceClassificationWithNormal_Weights Lfm2BidirectionalModel MistralModel "
        "NanbeigeForSequenceClassification PixtralVisionModel Qwen2ForRewardModel Qwen2ForSequenceClassification "
        "Qwen3ForRewardModel Qwen3ForSequenceClassification Qwen3Model TransformersEmbeddingModel "
        "TransformersMoEEmbeddingModel TransformersMultiModalEmbeddingModel TransformersMultiModalMoEEmbeddingModel "
        "TransformersForSequenceClassification TransformersMoEForSequenceClassification "
        "TransformersMultiModalForSequenceClassification TransformersMultiModalMoEForSequenceClassification",
        REFUSED,
        NO_DECODING,
    ),
    Family(
        "models without a class in SGLang (Seed-OSS, SmolLM3, ...)",
        "TransformersForCausalLM TransformersMoEForCausalLM TransformersMultiModalForCausalLM "
        "TransformersMultiModalMoEForCausalLM MindSporeForCausalLM",
        REFUSED,
        FALLBACK,
    ),
    Family(
        "draft models",
        "BailingMoeForCausalLMNextN DeepseekV3ForCausalLMNextN DeepseekV4ForCausalLMDSpark DeepseekV4ForCausalLMNextN "
        "DFlashDraftModel DFlashLagunaForCausalLM DFlash2DraftModel DFlash2BeamDraftModel MiniMaxDFlash2DraftModel "
        "MuseGlimmerAssistantModel Dots3NoteForCausalLMNextN DSparkDraftModel LingDSparkModel Qwen3DSparkModel "
        "DSparkMiniMaxDraftModel Eagle3DeepseekV2ForCausalLM Ernie4_5_MoeForCausalLMMTP ExaoneMoEForCausalLMMTP "
        "Gemma4AssistantForCausalLM Gemma4UnifiedAssistantForCausalLM GigaChat35ForCausalLMNextN "
        "Glm4MoeForCausalLMNextN Glm4MoeLiteForCausalLMNextN Glm5NextForConditionalGenerationNextN "
        "GlmMoeDsaForCausalLMNextN GlmOcrForConditionalGenerationNextN HYV3ForCausalLMNextN HYV4ForCausalLMNextN "
        "InklingForConditionalGenerationMTP IQuestQ1MTP Lfm2DSparkDraftModel LiLiCorrDraftModel LlamaForCausalLMEagle "
        "LlamaForCausalLMEagle3 LongcatFlashForCausalLMNextN MiMoMTP MiMoV2MTP MistralForCausalLMEagle "
        "MistralLarge3ForCausalLMEagle NemotronHForCausalLMMTP Qwen2ForCausalLMEagle Qwen3MoeForCausalLMMTP "
        "Qwen3NextForCausalLMMTP Qwen3_5ForCausalLMMTP Qwen4ExpForCausalLMMTP Step3p5MTP",
        REFUSED,
        DRAFT,
    ),
)

EXTERNAL = "SGLANG_EXTERNAL_MODEL_PACKAGE"  # classes that SGLang's registry has from elsewhere
BY_CLASS = {name: family for family in FAMILIES for name in family.classes.split()}


def class_of(model: Any) -> str:
    """The class that SGLang loads for a model, by its ``ModelConfig``: the first name that its configuration has."""
    return (model.hf_config.architectures or ["none"])[0]


def refused_in_file(model_path: str) -> tuple[str, str] | None:
    """The class that a model's file names, and why it is refused whatever else is configured; None: not known, or not.

    Args:
        model_path: a folder, or a hub id that is cached; nothing is downloaded.
    """
    file = Path(model_path) / "config.json"
    if not file.is_file():
        try:
            cached = try_to_load_from_cache(model_path, "config.json")
        except ValueError:  # it is no hub id either
            return None
        if not isinstance(cached, str):
            return None
        file = Path(cached)
    try:
        names = json.loads(file.read_text()).get("architectures") or []
    except (OSError, ValueError, AttributeError):
        return None
    family = BY_CLASS.get(names[0]) if names else None
    if family is None or family.verdict is not Verdict.REFUSED or family.unless is not None:
        return None
    return names[0], family.words


def why_refused(model: Any) -> str | None:
    """Why a model's class, or its configuration, is refused; None if it is not.

    Args:
        model: SGLang's ``ModelConfig``.
    """
    family = BY_CLASS.get(class_of(model))
    if model.model_impl == "transformers" or (family is None and not os.getenv(EXTERNAL)):
        return FALLBACK
    if family is None:
        return None
    is_unlike = family.unless is not None and family.unless.holds(model)
    if family.verdict is Verdict.REFUSED:
        return None if is_unlike else family.words
    return family.unless.why if family.unless is not None and is_unlike else None


def longest_window(model: Any) -> int | None:
    """Tokens of the sliding window that the model's layers are said to have; None: its class knows none.

    Args:
        model: SGLang's ``ModelConfig``.
    """
    family = BY_CLASS.get(class_of(model))
    if family is None or family.window_more is None:
        return None
    has_layers = "sliding_attention" in (_text(model, "layer_types") or ()) or _text(model, "sliding_window_pattern")
    if not has_layers or (tokens := _text(model, "sliding_window")) is None:
        return None
    return tokens + family.window_more


def verdict_on(model: Any) -> str:
    """In words, for ``doctor``: what becomes of a model that is not refused."""
    name, family = class_of(model), BY_CLASS.get(class_of(model))
    if family is None:
        return f"{name} is not known here: the self-test at start decides"
    if family.verdict is Verdict.REFUSED and family.unless is not None:
        return f"{name} is served, since {family.unless.condition}: the self-test at start decides"
    windows = longest_window(model)
    asked = "a tiny model of it runs in the tests" if family.is_tried else "the self-test at start decides"
    said = [family.words] if family.words else []
    if windows is not None:
        said.append(f"a span keeps {windows - 1:,} entries at the least, the model's sliding window")
    words = f" ({'; '.join(said)})" if said else ""
    return f"{name} is {family.verdict}{words}: {asked}"


def families_table() -> str:
    """The table of families, in Markdown."""
    rows = ["| family | classes | | |", "|---|---|---|---|"]
    for family in FAMILIES:
        classes = family.classes.split()
        shown = ", ".join(f"`{name}`" for name in classes[:3]) + (f" and {len(classes) - 3} more" * (len(classes) > 3))
        words = [family.words] if family.words else []
        if family.unless is not None:
            other = "served" if family.verdict is Verdict.REFUSED else "refused"
            words.append(f"{other} if {family.unless.condition}")
        if family.window_more is not None:
            words.append("[sliding windows](#sliding-windows)")
        verdict = f"{family.verdict}; tried" if family.is_tried else str(family.verdict)
        rows.append(f"| {family.name} | {shown} | {verdict} | {'; '.join(words)} |")
    return "\n".join(rows)
