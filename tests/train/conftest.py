"""A tiny random model with a real tokenizer, and real text to train it on."""

import pytest
import torch

from sglang_metasoft.train.backbone import Backbone
from sglang_metasoft.train.dataset import Dataset
from sglang_metasoft.train.prepare import prepare
from sglang_metasoft.train.settings import TrainSettings


@pytest.fixture(scope="session")
def tiny_model(tokenizer, tmp_path_factory):
    """Folder of a two-layer Llama with grouped heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=12, max_position_embeddings=4096, initializer_range=0.3,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def corpus(document, tmp_path_factory):
    """A folder with one text."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "document.txt").write_text(document)
    return folder


@pytest.fixture(scope="session")
def prepared_folder(tmp_path_factory):
    """Prepared cases, shared by all runs with the tiny model."""
    return tmp_path_factory.mktemp("prepared")


@pytest.fixture
def settings(tiny_model, corpus, prepared_folder, tmp_path):
    """Make settings of a short run; keywords override."""

    def make(**values) -> TrainSettings:
        defaults = dict(
            model=str(tiny_model), data=corpus, output=tmp_path / "run", prepared=prepared_folder, soft_tokens=4,
            scorer_width=4, cases=3, steps=4, selector_steps=2, batch=2, min_prefix_tokens=80, max_prefix_tokens=120,
            window=16, answer_tokens=8, validation_cases=1, validate_every=100, checkpoint_every=1,
        )  # fmt: skip
        return TrainSettings(**defaults | values)

    return make


@pytest.fixture(scope="module")
def backbone(tiny_model):
    return Backbone(str(tiny_model), torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def case(backbone, document):
    dataset = Dataset(
        backbone.tokenizer, [document], [], lengths=(80, 120), window=16, repeat_share=1, answer_tokens=8, seed=1
    )
    return next(case for case in map(dataset.__getitem__, range(50)) if case.family == "needles")


@pytest.fixture(scope="module")
def prepared(backbone, case):
    return prepare(backbone, case, 8)
