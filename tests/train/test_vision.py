"""A few steps of training on a tiny model that sees: the compressor is its text part's, and fits the whole model."""

import pytest
import torch
import transformers

from sglang_metasoft.compressor.find import check_given, given_compressor
from sglang_metasoft.hf.rows import embed_from_files
from sglang_metasoft.hf.shape import read_shape
from sglang_metasoft.train.command import train
from tests.tiny_models import ROWS, SEEING, TOWER
from tests.train.test_families import CPU, SIZES

TOWER_OF_48 = TOWER | dict(out_hidden_size=48, num_position_embeddings=64, deepstack_visual_indexes=[0])


@pytest.fixture
def folder(tokenizer, tmp_path):
    torch.manual_seed(5)
    text = SIZES | dict(rope_parameters=ROWS | dict(mrope_section=[2, 2, 2], mrope_interleaved=True))
    settings = SEEING | dict(text_config=text, vision_config=TOWER_OF_48)
    model = transformers.Qwen3VLForConditionalGeneration(transformers.Qwen3VLConfig(**settings))
    model.save_pretrained(tmp_path / "qwen3vl")
    tokenizer.save_pretrained(tmp_path / "qwen3vl")
    return tmp_path / "qwen3vl"


def test_ten_steps_make_a_compressor_of_a_model_that_sees(folder, settings, tmp_path):
    run = settings(model=str(folder), prepared=tmp_path / "prepared", steps=8, selector_steps=2)
    scores = train(run)
    assert 0 < scores["overlap metasoft inside 4x"] <= 1
    shape = read_shape(folder)
    compressor = given_compressor(str(run.output / "compressor"), shape)
    embed = embed_from_files(str(folder), shape)  # as a server finds its table, before the weights load
    check_given(compressor, shape, embed, CPU)
    with pytest.raises(ValueError, match="whose embedding table is not that of the served model"):
        check_given(compressor, shape, lambda ids: embed(ids).flip(-1), CPU)
