"""Which of SGLang's attention backends keep the sliding windows of which models."""

from typing import Any

from metasoft_patches.families import class_of, longest_window

WINDOWLESS = frozenset({"flex_attention"})  # attention backends of SGLang's that know no windows
PLANNED = frozenset({"flashinfer", "triton"})  # that ask a model's class for its window, and no layer
# Classes with window layers that do not answer: they have no ``get_attention_sliding_window_size``.
WITHOUT_PLAN = frozenset(
    {
        "Cohere2ForCausalLM",
        "Cohere2MoeForCausalLM",
        "Cohere2VisionForConditionalGeneration",
        "ExaoneMoEForCausalLM",
        "ExaoneMoeForCausalLM",
    }
)


def unkept_windows(model: Any, backends: set[str]) -> set[str]:
    """Those of some attention backends in which the model's window layers would not be windows.

    Two plan all windows of a model beforehand, for the one that its class names; where it names none, their decoding
    sees all tokens (flashinfer), or they fail (triton). The self-test cannot tell: what a window of thousands hides
    weighs less than the rounding of two computations.

    Args:
        model: SGLang's ``ModelConfig``.
    """
    if longest_window(model) is None:
        return set()
    return backends & (WINDOWLESS | (PLANNED if class_of(model) in WITHOUT_PLAN else frozenset()))
