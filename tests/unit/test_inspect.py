"""``sglang-metasoft inspect`` without a browser: what it reads, refuses, computes and writes."""

import functools
import gzip
import json
import re
import sys

import numpy as np
import pytest
import torch

from sglang_metasoft.cli import main
from sglang_metasoft.config import MetaSoftConfig
from sglang_metasoft.hf.model import load_tokenizer
from sglang_metasoft.inspect.inspected_model import InspectedModel
from sglang_metasoft.inspect.inspection import pack
from sglang_metasoft.inspect.page import script_json
from sglang_metasoft.inspect.prompt import read_prompt
from sglang_metasoft.pipeline.plan import plan_span


@pytest.fixture(scope="module")
def model(model_dir):
    return InspectedModel(model_dir, load_tokenizer(model_dir))


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", " \n", "is empty"),
        ("bytes.txt", b"\xff\xfe\x00", "cannot be read"),
        ("chat.json", "no", "is not JSON"),
        ("chat.json", '{"messages": 3}', "allowed: "),
        ("chat.json", "[]", "allowed: "),
        ("chat.json", '[{"role": "user", "content": null}]', "allowed: "),
        ("short.txt", "A few words.", r"too_short \(the \d+ less the window of 64 must be at least min_tokens, 512\)"),
        ("long.txt", "word " * 9000, r"the model takes \d+ beside the answer"),
    ],
)
def test_a_bad_prompt_is_refused_and_leaves_no_file(tmp_path, model_dir, capsys, name, content, words):
    path = write(tmp_path, name, content)
    argv = ["inspect", str(path), "--model-path", str(model_dir), "--output", str(tmp_path / "page.html")]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert re.search(words, error) and "Traceback" not in error
    assert [file.name for file in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["missing.txt"], "'missing.txt' is no file"),
        (["--metasoft-method", "magic"], "metasoft method: 'magic' is not allowed; allowed: one of: auto, metasoft"),
        (["--ratios", "2,x"], "--ratios: '2,x' is not allowed"),
        (["--ratios", "1"], "numbers above 1"),
        (["--max-new-tokens", "0"], "--max-new-tokens: 0"),
        (["--metasoft-config", '{"window": 0}'], "metasoft window: 0"),
        (["--output", "/proc/page.html"], "--output: '/proc/page.html' cannot be written"),
        (["--output", "/"], "is a folder"),
        (["--model-path", "/nowhere"], "holds no Hugging Face model"),
    ],
)
def test_a_bad_argument_is_refused(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", *argv]) == 2
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_chat_and_a_question_become_one_prompt(tmp_path, model):
    messages = [{"role": "user", "content": "Ä long text"}, {"role": "assistant", "content": "Yes?"}]
    for chat in (messages, {"messages": messages}):
        prompt = read_prompt(write(tmp_path, "chat.json", json.dumps(chat)), "And now?", model.tokenizer)
        asked = [*messages, {"role": "user", "content": "And now?"}]
        rendered = model.tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        assert prompt.ids == model.tokenizer(rendered, add_special_tokens=False)["input_ids"]
        assert "".join(prompt.texts).replace("·", "") == rendered


def test_a_character_of_several_tokens_is_shown_once(tmp_path, model):
    prompt = read_prompt(write(tmp_path, "text.txt", "one 𓀀 sign"), None, model.tokenizer)
    assert "".join(prompt.texts).count("𓀀") == 1 and len(prompt.texts) == len(prompt.ids)
    assert all(prompt.texts)


@pytest.fixture(scope="module")
def prefilled(model, document_ids):
    ids = document_ids[:640]
    return ids, *model.prefill(ids)


def test_ratio_one_gives_the_raw_answer(model, prefilled):
    ids, cache, first = prefilled
    config = MetaSoftConfig(ratio=1)
    plan = plan_span(config, prompt_tokens=len(ids), page_size=1)
    layers = model.compress(cache, ids, plan, model.make_method(config))
    plain = model.answer(cache, len(ids), first, 8, None)
    same = model.answer(model.compressed_cache(cache, plan, layers), len(ids), first, 8, plain.ids)
    assert same.ids == plain.ids and same.score == pytest.approx(plain.score, abs=1e-4)


@pytest.mark.parametrize("name", ["metasoft", "snapkv"])
def test_stages_see_the_attention_that_the_model_computes(model, prefilled, name):
    """Importance at the first layer and the last, against attention maps of the model's own eager attention."""
    ids, cache, _ = prefilled
    config = MetaSoftConfig(method=name, pool_kernel=1)
    plan = plan_span(config, prompt_tokens=len(ids), page_size=1)
    method = model.make_method(config)
    layers = model.compress(cache, ids, plan, method)
    span, tail = torch.tensor(ids[: plan.span_tokens]), torch.tensor(ids[plan.span_tokens :])
    embed = model.model.get_input_embeddings()
    start = len(ids) if name == "metasoft" else plan.span_tokens
    probe = method.soft_tokens(lambda i: embed(i).detach(), span, tail) if name == "metasoft" else embed(tail)
    whole = torch.cat([embed(torch.tensor(ids[:start])), probe]).detach()
    replaced = model.model.config._attn_implementation
    model.model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model.model(inputs_embeds=whole[None], output_attentions=True).attentions
    model.model.set_attn_implementation(replaced)
    for layer in (0, len(layers) - 1):
        attention = maps[layer][0, :, start:, : plan.span_tokens]
        expected = attention.reshape(3, -1, *attention.shape[1:]).mean(dim=(1, 2))
        torch.testing.assert_close(layers[layer].importance, expected, rtol=1e-2, atol=1e-6)


def test_a_sliding_window_is_refused(model, prefilled, monkeypatch):
    ids, cache, _ = prefilled
    config = MetaSoftConfig()
    plan = plan_span(config, prompt_tokens=len(ids), page_size=1)
    module = sys.modules[type(model.model).__module__]
    attention = module.LlamaAttention.forward
    windowed = functools.partialmethod(attention, sliding_window=9)
    monkeypatch.setattr(module.LlamaAttention, "forward", windowed)
    with pytest.raises(ValueError, match="plain causal attention in every layer; layer 0 has sliding_window"):
        model.compress(cache, ids, plan, model.make_method(config))


def test_data_in_a_script_element_cannot_end_it():
    text = "</script><!-- <script> ]]> \u2028 &lt;"
    written = script_json({"a": text})
    assert "<" not in written and json.loads(written) == {"a": text}


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
def test_packed_arrays_come_back_plane_by_plane(dtype):
    array = np.random.default_rng(1).integers(0, np.iinfo(dtype).max, (3, 50), dtype=dtype)
    planes = np.frombuffer(gzip.decompress(pack(array)), np.uint8).reshape(array.itemsize, -1)
    back = sum(plane.astype(np.uint64) << (8 * n) for n, plane in enumerate(planes))
    assert (back == array.reshape(-1)).all()
