"""What an operator does to running requests: preemption, pause and continue, weight updates."""

import base64
import json
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

import pytest
import requests
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import TEST_LAYERS
from tests.server.checks import SALT, SOFT_TOKENS, STRICT_CHECKS, assert_pool_is_whole, metasoft, wait_until

pytestmark = pytest.mark.server

POOL_TOKENS, WINDOW, NEW_TOKENS = 5120, 64, 80


@pytest.fixture(scope="module")
def server(start_server, compressor_dir):
    # SGLang preempts for want of a place in the batch, not of memory.
    flags = ["--max-total-tokens", str(POOL_TOKENS), "--enable-priority-scheduling", "--max-running-requests", "2"]
    flags += ["--dtype", "float32", "--metasoft-path", str(compressor_dir)]
    return start_server(*SOFT_TOKENS, "--enable-metrics", *flags, env=STRICT_CHECKS)


def post(server, path: str, body: dict) -> requests.Response:
    response = requests.post(server.url + path, json=body, timeout=300)
    assert response.status_code == 200, response.text
    return response


def generate_meanwhile(server, prompts, interrupt, new_tokens=NEW_TOKENS, **fields) -> list[dict]:
    """Start all prompts, wait until they run, interrupt, and return the responses."""
    sampling = {"ignore_eos": True}
    with ThreadPoolExecutor(len(prompts)) as pool:
        futures = [pool.submit(server.generate, ids, new_tokens, sampling_params=sampling, **fields) for ids in prompts]
        wait_until(server, lambda m: m["sglang:num_running_reqs"] == len(prompts), "all requests run")
        interrupt()
        return [future.result() for future in futures]


def check(prompts, responses, new_tokens=NEW_TOKENS) -> None:
    for ids, response in zip(prompts, responses, strict=True):
        meta = response["meta_info"]
        assert (meta["prompt_tokens"], meta["completion_tokens"]) == (len(ids), new_tokens)
        assert metasoft(response)["span_tokens"] >= len(ids) - WINDOW


def test_a_preempted_request_is_compressed_again_and_ends_well(server, document_ids):
    low = [document_ids[n * 100 :][:1400] for n in range(2)]
    urgent = document_ids[1000:2200]
    done = []

    def send_urgent():
        done.append(server.generate(urgent, 8, priority=100))

    responses = generate_meanwhile(server, low, send_urgent, new_tokens=200, priority=0)
    check(low, responses, 200)
    assert sum(response["meta_info"]["num_retractions"] for response in responses) >= 1
    assert metasoft(done[0])["span_tokens"] == len(urgent) - WINDOW
    assert_pool_is_whole(server, POOL_TOKENS)


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_paused_requests_go_on(server, document_ids, mode):
    prompts = [document_ids[50 + n * 100 :][:900] for n in range(2)]

    def pause_and_continue():
        post(server, "/pause_generation", {"mode": mode})
        time.sleep(1)
        post(server, "/continue_generation", {"torch_empty_cache": False})

    responses = generate_meanwhile(server, prompts, pause_and_continue)
    check(prompts, responses)
    retractions = [response["meta_info"]["num_retractions"] for response in responses]
    assert all(retractions) if mode == "retract" else not any(retractions)
    assert_pool_is_whole(server, POOL_TOKENS)


def test_pausing_with_abort_ends_requests_and_leaks_nothing(server, document_ids):
    body = {"input_ids": document_ids[30:1030], "sampling_params": {"max_new_tokens": 2000, "ignore_eos": True}}
    responses = []
    sender = threading.Thread(target=lambda: responses.append(requests.post(f"{server.url}/generate", json=body)))
    sender.start()
    wait_until(server, lambda m: m["sglang:num_running_reqs"] == 1, "the request runs")
    post(server, "/pause_generation", {"mode": "abort"})
    sender.join(60)
    assert not sender.is_alive() and responses[0].json()["meta_info"]["finish_reason"]["type"] == "abort"
    post(server, "/continue_generation", {"torch_empty_cache": False})
    assert_pool_is_whole(server, POOL_TOKENS)


def noisy_weights(model_dir, folder, *changed: str):
    """The same model, but for the tensors with these words in their names."""
    for path in model_dir.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    generator, changes = torch.Generator().manual_seed(3), 0
    for path in model_dir.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if any(word in name for word in changed):
                changes += 1
                noise = torch.randn(tensor.shape, generator=generator) * tensor.float().std() * 0.3
                tensors[name] = (tensor.float() + noise).to(tensor.dtype)
        save_file(tensors, folder / path.name, metadata={"format": "pt"})
    assert changes >= len(changed)
    return folder


LAST_LAYER = f"layers.{TEST_LAYERS - 1}."


@pytest.fixture(scope="module")
def other_weights(model_dir, tmp_path_factory):
    """Another last layer: the trained compressor serves it too."""
    return noisy_weights(model_dir, tmp_path_factory.mktemp("weights"), LAST_LAYER)


@pytest.fixture(scope="module")
def foreign_weights(model_dir, tmp_path_factory):
    """Other embeddings as well, which the compressor was not trained for."""
    return noisy_weights(model_dir, tmp_path_factory.mktemp("weights"), LAST_LAYER, "embed_tokens")


def update(server, weights, flush_cache: bool) -> None:
    body = {"model_path": str(weights), "flush_cache": flush_cache}
    assert post(server, "/update_weights_from_disk", body).json()["success"]


def log_lines(server, words: str) -> int:
    return sum(words in line for line in server.log.read_text(errors="replace").splitlines())


def test_compressed_entries_never_survive_a_weight_update(server, document_ids, model_dir, other_weights):
    """Not even if the client asks SGLang to keep its cache; and what is compressed then is of the new weights."""
    ids, options = document_ids[500:1700], {"max_new_tokens": NEW_TOKENS, "sampling_params": {"ignore_eos": True}}
    before = server.generate(ids, **options)
    repeat = server.generate(ids, **options)
    assert metasoft(repeat)["reused_tokens"] == 1200 - WINDOW

    update(server, other_weights, flush_cache=False)
    assert metasoft(server.generate(ids, **options))["reused_tokens"] == 0
    # SGLang's own raw entries are kept on the client's word; without them:
    post(server, "/flush_cache", {})
    changed = server.generate(ids, **options)
    changed_repeat = server.generate(ids, **options)
    assert metasoft(changed)["reused_tokens"] == 0 < metasoft(changed_repeat)["reused_tokens"]
    assert changed["output_ids"] != before["output_ids"]

    assert_pool_is_whole(server, POOL_TOKENS)  # waits until it idles: 0.5.17 stops at a flush under running requests
    update(server, model_dir, flush_cache=True)
    after = server.generate(ids, **options)
    assert metasoft(after)["reused_tokens"] == 0
    assert after["output_ids"] == before["output_ids"]
    assert server.generate(ids, **options)["output_ids"] == repeat["output_ids"]
    assert_pool_is_whole(server, POOL_TOKENS)


def test_an_update_under_running_requests_drops_what_they_computed(server, document_ids, other_weights, model_dir):
    prompts = [document_ids[900:1900]]

    def update_in_place():
        post(server, "/pause_generation", {"mode": "in_place"})
        for weights in (other_weights, model_dir):
            update(server, weights, flush_cache=False)
        post(server, "/continue_generation", {"torch_empty_cache": False})

    responses = generate_meanwhile(server, prompts, update_in_place)
    check(prompts, responses)
    assert metasoft(server.generate(prompts[0], 4))["reused_tokens"] == 0
    assert_pool_is_whole(server, POOL_TOKENS)


def test_weights_that_the_compressor_does_not_fit_are_served_uncompressed(
    server, document_ids, model_dir, foreign_weights
):
    """The embeddings are others: no prompt is compressed, none reuses an old prefix, until they are the old ones."""
    ids = document_ids[700:1900]
    first = server.generate(ids, 8)
    assert metasoft(first)["span_tokens"] == 1200 - WINDOW
    update(server, foreign_weights, flush_cache=True)
    refused = log_lines(server, "no prompt is compressed until the weights are updated again")
    for _ in range(2):  # the first finds out, the second is told on arrival
        response = server.generate(ids, 8)
        assert metasoft(response) == {"span_tokens": 0, "kv_tokens": 1200, "reused_tokens": 0, "bypass": "weights"}
        assert response["output_ids"] != first["output_ids"]
    assert log_lines(server, "no prompt is compressed until the weights are updated again") == refused + 1
    assert "was trained for" in requests.get(f"{server.url}/server_info", timeout=60).text
    assert 'bypass="weights"' in requests.get(f"{server.url}/metrics", timeout=60).text
    update(server, model_dir, flush_cache=True)
    again = server.generate(ids, 8)
    assert metasoft(again) == metasoft(first) and again["output_ids"] == first["output_ids"]
    assert log_lines(server, "the weights fit again") == 1
    assert metasoft(server.generate(ids, 8))["reused_tokens"] == 1200 - WINDOW
    assert_pool_is_whole(server, POOL_TOKENS)


@pytest.mark.skipif(version("sglang") == "0.5.17", reason="which has no sessions of weight updates")
def test_an_update_by_tensors_forgets_and_is_followed_once(server, document_ids, model_dir, other_weights):
    """As trainers send them: bucket by bucket, between begin and end."""
    ids = document_ids[300:1500]

    def send(weights):
        assert post(server, "/begin_weight_update", {}).json()["success"]
        for path in weights.glob("*.safetensors"):
            for named in load_file(path).items():
                if LAST_LAYER in named[0]:
                    bucket = base64.b64encode(pickle.dumps([named])).decode()
                    body = {"serialized_named_tensors": [bucket], "flush_cache": False}
                    assert post(server, "/update_weights_from_tensor", body).json()["success"]
        assert post(server, "/end_weight_update", {}).json()["success"]

    server.generate(ids, 8)
    assert metasoft(server.generate(ids, 8))["reused_tokens"] == 1200 - WINDOW
    for weights in (other_weights, model_dir):
        followed = log_lines(server, "follows the updated weights")
        send(weights)
        post(server, "/flush_cache", {})  # of SGLang's own raw entries
        responses = [server.generate(ids, 8) for _ in range(2)]
        assert [metasoft(response)["reused_tokens"] for response in responses] == [0, 1200 - WINDOW]
        assert log_lines(server, "follows the updated weights") == followed + 1
    assert_pool_is_whole(server, POOL_TOKENS)


def test_metrics_count_what_happened(server, document_ids):
    """A prompt, and the same again: what both add to the counters, and nothing else."""
    before = server.metrics()
    for _ in range(2):
        server.generate(document_ids[70:1070], 4, **{SALT: "counted"})
    after = server.metrics()
    span = 1000 - WINDOW
    expected = {"spans": 1, "span_tokens": span, "saved_slots": span - (250 - WINDOW), "reused_tokens": span}
    names = {name: f"sglang:metasoft_{name}_total" for name in expected}
    assert {name: after[full] - before.get(full, 0) for name, full in names.items()} == expected
    text = requests.get(f"{server.url}/metrics", timeout=60).text
    assert 'bypass="none"' in text, json.dumps(after)
