"""A model that sees, in process: evaluation, inspection and training run its text part."""

import pytest
import torch
import transformers

from sglang_metasoft.hf.cache import Batch, generate
from sglang_metasoft.hf.model import HFModel
from sglang_metasoft.types import Turning
from tests.tiny_models import MODELS, VOCABULARY, make_model, make_twin

CPU = torch.device("cpu")
PROMPT_TOKENS, OUTPUT_TOKENS = 300, 6


@pytest.mark.parametrize("name", [name for name, tiny in MODELS.items() if tiny.processor])
def test_entries_answers_and_turnings_are_those_of_the_text_part(name, tmp_path):
    twin = transformers.AutoModelForCausalLM.from_pretrained(make_twin(tmp_path / "twin", name), dtype=torch.float32)
    model = HFModel(make_model(tmp_path / "model", name), CPU, torch.float32)
    assert type(model.model).__name__ == MODELS[name].class_name
    ids = torch.randint(7, VOCABULARY, (PROMPT_TOKENS,)).tolist()
    with torch.no_grad():
        expected = twin(torch.tensor([ids])).logits[0, -1]
    layers, last = model.prefill(ids)
    torch.testing.assert_close(last, expected, atol=1e-4, rtol=1e-4)
    whole = twin.generate(torch.tensor([ids]), max_new_tokens=OUTPUT_TOKENS, do_sample=False, pad_token_id=0)
    batch = Batch(model, [layers], OUTPUT_TOKENS)
    (answer,) = generate(batch, [int(last.argmax())], PROMPT_TOKENS, OUTPUT_TOKENS)
    assert answer == whole[0, PROMPT_TOKENS:].tolist()
    found = model.layers()
    assert [layer.turning for layer in found] == [Turning.ROPE] * len(found)
