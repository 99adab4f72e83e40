"""Model classes that tests hand to SGLang from outside (`SGLANG_EXTERNAL_MODEL_PACKAGE`)."""
