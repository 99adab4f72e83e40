"""Tiny models that see and have M-RoPE: text prompts as every family's, and prompts with an image beside them.

What a model says of an image is transformers' own answer; plain SGLang's is asked for in ``make test-all``.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
import transformers

from sglang_metasoft.types import Bypass
from tests.server import test_model_families as families
from tests.server.checks import SALT, metasoft
from tests.server.forked import start
from tests.tiny_models import MODELS, VOCABULARY, draw, make_model
from tests.tiny_vision import IMAGE_TOKENS, as_url, make_image, placed

pytestmark = pytest.mark.server

SLOW = {"qwen2_5_vl", "glm4v"}
NAMES = [
    pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name, tiny in MODELS.items() if tiny.processor
]
RATIO, OUTPUT_TOKENS = families.RATIO, 24
TEXT = "The light keeper counted ships, wrote down their names, and what the weather was when they passed by. "

# The same of these models as of the others.
model_dir, reference, served, ids = families.model_dir, families.reference, families.served, families.ids
test_at_ratio_one_it_says_what_the_plain_model_says = families.test_at_ratio_one_it_says_what_the_plain_model_says
test_at_ratio_four_entries_are_the_references = families.test_at_ratio_four_entries_and_decoding_are_the_references
test_a_document_is_shared_by_two_questions = families.test_a_document_is_shared_by_two_questions
test_the_start_tests_the_model = families.test_the_start_tests_the_model


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def oracle(name, tmp_path_factory):
    """What transformers says of a text with an image: ids of greedy tokens."""
    processor = transformers.AutoProcessor.from_pretrained(make_model(tmp_path_factory.mktemp("oracle"), name))
    model = draw(name).eval()
    model.resize_token_embeddings(VOCABULARY + 2, mean_resizing=False)  # places of images have ids behind the others

    def answer(text: str, image) -> list[int]:
        inputs = processor(text=[text], images=[image], return_tensors="pt")
        out = model.generate(
            **inputs, max_new_tokens=OUTPUT_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0,
            suppress_tokens=[VOCABULARY, VOCABULARY + 1],
        )  # fmt: skip
        return out[0, inputs["input_ids"].shape[1] :].tolist()

    return answer


def ask(server, text: str, image=None, **fields) -> dict:
    image_data = {} if image is None else {"image_data": as_url(image)}
    options = {"custom_params": {"metasoft_ratio": RATIO}, "sampling_params": {"ignore_eos": True}}
    return server.generate(text, OUTPUT_TOKENS, **image_data, **options, **fields)


def test_an_image_beside_compressed_texts_is_answered_as_without_compression(served, name, oracle):
    """All decode in one batch: the image's positions are its own, those of the compressed texts the prompts'."""
    texts = [f"{number}: " + TEXT * 6 for number in range(3)]
    seen, image = f"Look: {TEXT * 3}{placed(MODELS[name].processor)} {TEXT}", make_image()
    alone = [ask(served.server, text, **{SALT: "alone"}) for text in texts]
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(ask, served.server, text, **{SALT: "beside"}) for text in texts]
        about_image = pool.submit(ask, served.server, seen, image, **{SALT: "beside"}).result()
        beside = [request.result() for request in asked]
    tokens = len(seen) - len(placed(MODELS[name].processor)) + 2 + IMAGE_TOKENS
    assert about_image["output_ids"] == oracle(seen, image)
    assert metasoft(about_image) == {
        "span_tokens": 0, "kv_tokens": tokens, "reused_tokens": 0, "bypass": Bypass.MULTIMODAL.value,
    }  # fmt: skip
    for one, other in zip(alone, beside, strict=True):
        assert metasoft(other)["kv_tokens"] == -(-other["meta_info"]["prompt_tokens"] // RATIO)
        assert other["output_ids"] == one["output_ids"]


def test_an_image_that_follows_cached_text_is_computed(served, name, oracle):
    """The first id to compute is the image's place, which SGLang makes from the image's hash: up to 2^62."""
    text = f"{placed(MODELS[name].processor)} {TEXT}"
    for seed in range(1, 6):
        before, image = "Another: " + TEXT * 2, make_image(seed)
        response = ask(served.server, before + text, image, **{SALT: "again"})
        assert response["output_ids"] == oracle(before + text, image)
        assert response["meta_info"]["cached_tokens"] == (0 if seed == 1 else len(before) + 1)


def test_a_chat_is_compressed_until_it_gets_an_image_and_raw_from_there(served):
    def turn(message) -> dict:
        messages.append({"role": "user", "content": message})
        response = served.server.chat(
            messages, 6, return_meta_info=True, custom_params={"metasoft_ratio": RATIO}, **{SALT: "chat"}
        )
        choice = response["choices"][0]
        messages.append({"role": "assistant", "content": "It does."})
        return {"prompt_tokens": response["usage"]["prompt_tokens"]} | metasoft(choice)

    messages: list[dict] = []
    first = turn(TEXT * 6)
    assert first["kv_tokens"] == -(-first["prompt_tokens"] // RATIO)
    second = turn("What did the light keeper count?")
    assert second["reused_tokens"] == first["span_tokens"] > 500
    image = {"type": "image_url", "image_url": {"url": as_url(make_image(9))}}
    for message in ([image, {"type": "text", "text": "And here?"}], TEXT * 6):
        later = turn(message)
        assert later["bypass"] == Bypass.MULTIMODAL.value and later["kv_tokens"] == later["prompt_tokens"]
    assert metasoft(ask(served.server, TEXT * 6))["span_tokens"] > 500  # others are compressed as before


@pytest.mark.slow
def test_plain_sglang_says_the_same_of_an_image(served, name, tmp_path):
    text = f"Look: {TEXT * 5}{placed(MODELS[name].processor)} {TEXT}"
    with start(make_model(tmp_path / "model", name), families.PLAIN_FLAGS, log=tmp_path / "log") as plain:
        for image in (make_image(4), make_image(5)):
            ours, theirs = (ask(server, text, image) for server in (served.server, plain))
            assert ours["output_ids"] == theirs["output_ids"]
            for field in ("prompt_tokens", "cached_tokens", "image_tokens"):
                assert ours["meta_info"][field] == theirs["meta_info"][field]
