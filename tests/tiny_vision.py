"""What a tiny model that sees needs beside its weights: a tokenizer of bytes, an image processor, and an image."""

import base64
import io
import json
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PATCH = 14  # pixels of a side; SGLang's Qwen2.5-VL takes no other
SIDE = 2 * PATCH  # of what becomes one token
IMAGE_TOKENS = 16
START, END = 5, 6  # ids of the words around an image


class Words(NamedTuple):
    """Of a family's tokenizers, and the processors that read them."""

    image: str  # in an image's place
    video: str
    start: str
    end: str
    image_processor: str
    video_processor: str


QWEN = Words("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "Qwen2VL", "Qwen2VL")
FAMILIES = {
    "Qwen2VL": QWEN,
    "Qwen2_5_VL": QWEN,
    "Qwen3VL": QWEN._replace(video_processor="Qwen3VL"),
    "Glm4v": Words("<|image|>", "<|video|>", "<|begin_of_image|>", "<|end_of_image|>", "Glm4v", "Glm4v"),
}
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% else %}IMAGE{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def special_ids(vocabulary: int) -> dict[str, int]:
    """Fields of a configuration; what stands in an image's place lies behind the vocabulary of the text part."""
    return dict(
        image_token_id=vocabulary, video_token_id=vocabulary + 1, vision_start_token_id=START, vision_end_token_id=END,
        image_start_token_id=START, image_end_token_id=END,
        video_start_token_id=vocabulary - 2, video_end_token_id=vocabulary - 1,
    )  # fmt: skip


def placed(family: str) -> str:
    """In a prompt's text: an image's place."""
    words = FAMILIES[family]
    return words.start + words.image + words.end


def save_processor(folder: Path, family: str, vocabulary: int) -> None:
    """Write tokenizer, chat template and image processor beside a model.

    Args:
        family: of :data:`FAMILIES`.
        vocabulary: ids of the text part.
    """
    words = FAMILIES[family]
    first = ["<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>", words.start, words.end]
    table = {symbol: number for number, symbol in enumerate([*first, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    table |= {f"<|unused_{number}|>": number for number in range(len(table), vocabulary)}
    table |= {words.image: vocabulary, words.video: vocabulary + 1}
    tokenizer = Tokenizer(models.BPE(vocab=table, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=first[0], bos_token=first[1], eos_token=first[2],
        extra_special_tokens=[*first[3:], words.image, words.video],
        chat_template=TEMPLATE.replace("IMAGE", placed(family)),
    ).save_pretrained(folder)  # fmt: skip
    sizes = dict(
        patch_size=PATCH, temporal_patch_size=2, merge_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3,
        size={"shortest_edge": SIDE * SIDE, "longest_edge": 64 * SIDE * SIDE}, processor_class=f"{family}Processor",
    )  # fmt: skip
    image = sizes | {"image_processor_type": f"{words.image_processor}ImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(image))
    video = sizes | {"video_processor_type": f"{words.video_processor}VideoProcessor"}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video))


def make_image(seed: int = 0) -> Image.Image:
    """A small picture of IMAGE_TOKENS tokens."""
    side = SIDE * int(IMAGE_TOKENS**0.5)
    image = Image.new("RGB", (side, side))
    for x in range(side):
        for y in range(side):
            image.putpixel((x, y), ((x * 7 + seed * 31) % 256, y * 5 % 256, (x * y + seed) % 256))
    return image


def as_url(image: Image.Image) -> str:
    """As clients send it: a PNG in base64."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
