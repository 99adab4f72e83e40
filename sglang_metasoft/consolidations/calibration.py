"""The text that start-up reads to learn what a model's queries are like."""

from sglang_metasoft.data import DOCUMENT
from sglang_metasoft.types import ServedModel

CALIBRATION_TOKENS = 1024


def calibration_ids(model: ServedModel) -> list[int]:
    """The first tokens of the shipped public-domain text.

    Raises:
        ValueError: the server has no tokenizer.
    """
    text = DOCUMENT.read_text(encoding="utf-8")
    return model.encode(text)[:CALIBRATION_TOKENS]
