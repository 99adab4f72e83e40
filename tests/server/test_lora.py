"""LoRA adapters and the base model side by side on one real server, against Hugging Face with the adapter merged in."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.lora_adapters import merge_adapter, write_adapter
from tests.reference.meta_soft_reference import Reference
from tests.server.checks import SALT, assert_pool_is_whole, assert_sound_inside, inside_env, inside_lines, metasoft
from tests.server.test_reference import calibration_ids, compare_entries

pytestmark = pytest.mark.server

PROMPT_TOKENS, WINDOW, NEW_TOKENS, SINK, TARGETS = 600, 16, 8, 4, 4
POOL_TOKENS = 32768
SERVED = (None, "A", "B")
RATIO_FOUR = {"custom_params": {"metasoft_ratio": 4}}


@pytest.fixture(scope="module")
def adapters(model_dir, tmp_path_factory):
    """Folders of four adapters; D changes the embedding table too."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: write_adapter(root / name, model, seed, size=0.06, embeddings=name == "D")
        for seed, name in enumerate("ABCD")
    }


@pytest.fixture(scope="module")
def merged(model_dir, adapters, tmp_path_factory):
    """Folders of the base model, None, and of what adapters make of it."""
    folders = {None: model_dir}
    for name in "ABC":
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        merge_adapter(model, adapters[name])
        folders[name] = tmp_path_factory.mktemp(f"merged-{name}")
        model.save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="module")
def expected(merged):
    """What a model says, token by token; ``expected(name, ids)``."""
    models = {}

    @torch.no_grad()
    def answer(name, ids):
        if name not in models:
            models[name] = AutoModelForCausalLM.from_pretrained(merged[name], dtype=torch.float32).eval()
        out = models[name].generate(torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)
        return out[0, len(ids) :].tolist()

    return answer


@pytest.fixture(scope="module")
def trace_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("trace")


@pytest.fixture(scope="module")
def server(start_server, adapters, compressor_dir, trace_dir):
    """At ratio 1. Three adapters, or two and the base model, fit into its adapter pool at once; four are served."""
    return start_server(
        "--dtype", "float32", "--lora-backend", "torch_native", "--max-loras-per-batch", "3", "--lora-paths",
        *(f"{name}={adapters[name]}" for name in "ABD"), "--max-total-tokens", str(POOL_TOKENS), "--enable-metrics",
        "--enable-metasoft", "--metasoft-path", str(compressor_dir), "--metasoft-ratio", "1",
        "--metasoft-window", str(WINDOW), "--metasoft-min-tokens", "256",
        "--metasoft-config", json.dumps({"trace_dir": str(trace_dir), "consolidation": "key_bias"}),
        env=inside_env(),
    )  # fmt: skip


def ask(server, ids, name, **fields) -> dict:
    fields = {"sampling_params": {"ignore_eos": True}} | fields
    return server.generate(ids, NEW_TOKENS, lora_path=name, **fields)


def test_ratio_one_equals_the_merged_models(server, document_ids, expected):
    ids = document_ids[:PROMPT_TOKENS]
    answers = {name: expected(name, ids) for name in SERVED}
    assert len({tuple(answer) for answer in answers.values()}) == len(SERVED)
    for turn in range(2):
        for name in SERVED:  # each finds its own prefix alone, whoever came before
            response = ask(server, ids, name)
            assert response["output_ids"] == answers[name]
            assert metasoft(response)["span_tokens"] == PROMPT_TOKENS - WINDOW
            assert metasoft(response)["reused_tokens"] == turn * (PROMPT_TOKENS - WINDOW)
    for name in SERVED:
        longer = ids + answers[name] + document_ids[3000:3050]
        response = ask(server, longer, name)
        assert response["output_ids"] == expected(name, longer)
        assert metasoft(response)["reused_tokens"] == PROMPT_TOKENS - WINDOW


def test_entries_of_a_mixed_batch_are_the_references(
    server, document_ids, merged, compressor_dir, tokenizer, trace_dir
):
    """Base and both adapters are prefilled, and probed, as one batch: each entry as if its model had been alone."""
    prompts = {
        name: document_ids[start : start + PROMPT_TOKENS]
        for name, start in zip(SERVED, (1000, 1300, 1600), strict=True)
    }
    body = {
        "input_ids": list(prompts.values()), "lora_path": list(prompts), "rid": [f"mixed-{name}" for name in prompts],
        "sampling_params": {"temperature": 0, "max_new_tokens": 2, **RATIO_FOUR},
    }  # fmt: skip
    response = requests.post(f"{server.url}/generate", json=body, timeout=600)
    response.raise_for_status()
    assert "#new-seq: 3" in server.log.read_text(errors="replace")
    for name, ids in prompts.items():
        (path,) = trace_dir.glob(f"mixed-{name}-*.safetensors")
        reference = Reference(merged[name], compressor_dir)
        entries = PROMPT_TOKENS // 4 - WINDOW
        wanted = reference.compress(ids, WINDOW, entries, SINK, TARGETS, calibration_ids(tokenizer))
        common, error = compare_entries(load_file(path), wanted)
        assert common > 0.995 and error < 1e-4, (name, common, error)


def test_an_adapters_prompt_is_nobody_elses(server, document_ids):
    ids = document_ids[200 : 200 + PROMPT_TOKENS]
    assert metasoft(ask(server, ids, "A", **RATIO_FOUR))["span_tokens"] == PROMPT_TOKENS - WINDOW
    again = ask(server, ids, "A", **RATIO_FOUR)
    assert metasoft(again)["reused_tokens"] == PROMPT_TOKENS - WINDOW
    for name in ("B", None):
        response = ask(server, ids, name, **RATIO_FOUR)
        assert (metasoft(response)["reused_tokens"], response["meta_info"]["cached_tokens"]) == (0, 0)
        # As on a fresh server: nothing is shared under a salt that is used for the first time.
        assert response["output_ids"] == ask(server, ids, name, **RATIO_FOUR, **{SALT: "fresh"})["output_ids"]
    assert metasoft(ask(server, ids, "A", **RATIO_FOUR, **{SALT: "other"}))["reused_tokens"] == 0


def test_an_extra_key_that_spells_an_adapters_id_finds_no_prefix_of_it(server, adapters, document_ids):
    """SGLang keeps adapters apart by putting their ids behind the client's ``extra_key``."""
    from sglang.srt.lora.lora_registry import LoRARef

    ids = document_ids[2000 : 2000 + PROMPT_TOKENS]
    ask(server, ids, "A")
    spelled = LoRARef.deterministic_id("A", str(adapters["A"]))
    assert metasoft(ask(server, ids, None, extra_key=spelled))["reused_tokens"] == 0


def test_an_adapter_is_named_by_its_path_alone(server, adapters, document_ids):
    """``lora_id`` is SGLang's own; one that is not loaded would end its scheduler."""
    from sglang.srt.lora.lora_registry import LoRARef

    for lora_id in ("unknown", LoRARef.deterministic_id("A", str(adapters["A"]))):
        body = {"input_ids": document_ids[:300], "lora_id": lora_id, "sampling_params": {"max_new_tokens": 1}}
        response = requests.post(f"{server.url}/generate", json=body, timeout=60)
        assert response.status_code == 400 and lora_id in response.text


def test_a_burst_gives_the_answers_of_one_by_one(server, document_ids):
    """Adapters take turns in the pool of three; every prompt is compressed and its repeat reuses its own prefix."""
    checks = len(inside_lines(server, "ok"))
    work = [(SERVED[n % 3], document_ids[30 * n : 30 * n + 400 + 60 * (n % 5)]) for n in range(6)]
    work += [("D", document_ids[700:1100])]

    def two_turns(item, salt):
        return [ask(server, item[1], item[0], **RATIO_FOUR, **{SALT: salt}) for _ in range(2)]

    alone = [two_turns(item, "alone") for item in work]
    with ThreadPoolExecutor(len(work)) as pool:
        burst = list(pool.map(lambda item: two_turns(item, "burst"), work))
    for (name, ids), here, there in zip(work, alone, burst, strict=True):
        for turns in (here, there):
            if name == "D":
                assert {metasoft(response)["bypass"] for response in turns} == {"lora"}
            else:
                assert metasoft(turns[1])["reused_tokens"] == len(ids) - WINDOW
        assert [response["output_ids"] for response in here] == [response["output_ids"] for response in there]
    assert_sound_inside(server, checks)


def test_a_reloaded_adapter_reuses_nothing_of_its_former_weights(server, adapters, document_ids, expected):
    """Unloaded, written over in place, loaded again under the same name."""
    ids = document_ids[400 : 400 + PROMPT_TOKENS]
    assert ask(server, ids, "B")["output_ids"] == expected("B", ids)
    for file in adapters["C"].iterdir():
        shutil.copy(file, adapters["B"] / file.name)
    for call, body in (
        ("unload_lora_adapter", {"lora_name": "B"}),
        ("load_lora_adapter", {"lora_name": "B", "lora_path": str(adapters["B"])}),
    ):
        requests.post(f"{server.url}/{call}", json=body, timeout=60).raise_for_status()
    for turn in range(2):
        response = ask(server, ids, "B")
        assert response["output_ids"] == expected("C", ids)
        assert metasoft(response)["reused_tokens"] == turn * (PROMPT_TOKENS - WINDOW)
    assert_pool_is_whole(server, POOL_TOKENS)
