"""Real servers on the device: the same checks for each attention backend and page size."""

import json
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import requests
import torch
from safetensors.torch import load_file

from tests.gpu.conftest import BACKENDS, DEVICE_FLAGS, DRY_RUN, PAGES, POOL_TOKENS
from tests.reference.meta_soft_reference import Reference
from tests.server.checks import SALT, aborting, assert_pool_is_whole, assert_sound_after_all, inside_env, metasoft
from tests.server.test_identity import outputs
from tests.server.test_reference import calibration_ids, compare_entries

pytestmark = [pytest.mark.server, pytest.mark.gpu]

WINDOW = 64
REFERENCE_TOKENS = 1024 if DRY_RUN else 2048
REQUESTS = 12 if DRY_RUN else 64
CHUNKS = ["--chunked-prefill-size", "1024"]


def two_turns(server, prompts, question) -> list[tuple[dict, dict]]:
    """One request at a time: in bf16, who shares a batch decides near ties, in plain SGLang too."""
    turns = []
    for prompt in prompts:
        first = server.generate(prompt, 16)
        turns.append((first, server.generate(prompt + first["output_ids"] + question, 16)))
    return turns


@pytest.fixture(scope="module", params=[(backend, page) for backend in BACKENDS for page in PAGES], ids=str)
def served(request, start_server, compressor_dir, long_ids, tokenizer, tmp_path_factory):
    """What plain SGLang says, and a compressing server whose default is to keep everything."""
    backend, page = request.param
    flags = [*DEVICE_FLAGS, *CHUNKS, "--attention-backend", backend, "--page-size", str(page)]
    flags += ["--max-total-tokens", str(POOL_TOKENS), "--enable-metrics"]
    prompts = [long_ids[50 * n :][:length] for n, length in enumerate((1000, 1500, 2100, 4000)[: 2 if DRY_RUN else 4])]
    question = tokenizer("\nWhat else did he say?")["input_ids"]
    plain = outputs(two_turns(start_server(*flags), prompts, question))
    trace_dir = tmp_path_factory.mktemp("trace")
    server = start_server(
        *flags, "--enable-metasoft", "--metasoft-ratio", "1", "--metasoft-path", str(compressor_dir),
        "--metasoft-config", f'{{"trace_dir": "{trace_dir}"}}', env=inside_env(),
    )  # fmt: skip
    return SimpleNamespace(server=server, plain=plain, prompts=prompts, question=question, trace_dir=trace_dir)


@pytest.fixture(autouse=True)
def nothing_leaks(request):
    """After each test: tree, pool, locks and prefixes are sound, and the pool is whole."""
    served = request.getfixturevalue("served") if "served" in request.fixturenames else None
    yield
    if served is not None:
        assert_sound_after_all(served.server)
        assert_pool_is_whole(served.server, POOL_TOKENS)


def assert_entries_follow(expected, trace_dir, rid: str) -> None:
    """bf16 against float32: the choice may differ at the cut, the entries by what bf16 rounds."""
    (trace,) = trace_dir.glob(f"{rid}-*.safetensors")
    overlap, error = compare_entries(load_file(trace), expected)
    print(f"{rid}: kept entries in common {overlap:.4f}; largest median relative error of an entry {error:.4f}")
    assert overlap > 0.95 and error < 0.05


def mixed_prompts(long_ids) -> list[list[int]]:
    return [long_ids[37 * n :][: (90, 700, 1500, 3000)[n % 4]] for n in range(REQUESTS)]


def ask_all(server, prompts, new_tokens: int, ratio: float, at_once: int | None = None, **fields) -> list[dict]:
    options = {"custom_params": {"metasoft_ratio": ratio}, "sampling_params": {"ignore_eos": True}}
    with ThreadPoolExecutor(at_once or len(prompts)) as pool:
        return list(pool.map(lambda ids: server.generate(ids, new_tokens, **options, **fields), prompts))


def test_ratio_one_equals_plain_sglang(served):
    turns = two_turns(served.server, served.prompts, served.question)
    assert all(metasoft(first)["span_tokens"] > 0 for first, _ in turns)
    assert outputs(turns) == served.plain


@pytest.mark.parametrize("ratio", [4, 8])
def test_entries_equal_the_reference(served, model_dir, compressor_dir, long_ids, ratio):
    ids = long_ids[300:][:REFERENCE_TOKENS]
    response = served.server.generate(
        ids, 1 + 1, rid=f"reference{ratio}", custom_params={"metasoft_ratio": ratio}, **{SALT: f"reference{ratio}"}
    )
    assert metasoft(response)["kv_tokens"] == REFERENCE_TOKENS // ratio
    expected = Reference(model_dir, compressor_dir).compress(
        ids, WINDOW, REFERENCE_TOKENS // ratio - WINDOW, sink=4, targets=4
    )
    assert_entries_follow(expected, served.trace_dir, f"reference{ratio}")


def test_many_at_once(served, long_ids):
    """Mixed lengths, most of them compressed; all answered in full."""
    prompts = mixed_prompts(long_ids)
    responses = ask_all(served.server, prompts, 16, ratio=4)
    for ids, response in zip(prompts, responses, strict=True):
        assert (response["meta_info"]["prompt_tokens"], response["meta_info"]["completion_tokens"]) == (len(ids), 16)
        assert len(ids) < 600 or metasoft(response)["kv_tokens"] < len(ids) / 2


def test_a_chat_grows_by_segments(served, long_ids):
    ids, span = long_ids[1000:1800], 0
    for turn in range(3):
        response = served.server.generate(ids, 8, custom_params={"metasoft_ratio": 4})
        report = metasoft(response)
        assert report["span_tokens"] > span and report["reused_tokens"] == span
        span = report["span_tokens"]
        ids = ids + response["output_ids"] + long_ids[2000 + 700 * turn :][:700]


def test_a_shared_document_is_computed_once(served, long_ids):
    document, computed = long_ids[4000:6000], []
    options = {"metasoft_ratio": 4, "metasoft_boundary": len(document)}
    for number in range(3):
        meta = served.server.generate(document + long_ids[number * 40 :][:40], 4, custom_params=options)["meta_info"]
        computed.append(meta["prompt_tokens"] - meta["cached_tokens"])
    assert computed[0] >= 2000 and all(tokens <= 40 + 16 for tokens in computed[1:])


def test_aborted_requests_leave_nothing(served, long_ids):
    rids = [f"abort{n}" for n in range(8)]
    body = {"sampling_params": {"temperature": 0, "max_new_tokens": 2000, "ignore_eos": True}}

    def ask(number):
        ids = long_ids[90 * number :][:1500]
        with aborting(served.server, rids[number], 0.3 * number):
            return requests.post(f"{served.server.url}/generate", json=body | {"input_ids": ids, "rid": rids[number]})

    with ThreadPoolExecutor(len(rids)) as pool:
        for response in pool.map(ask, range(len(rids))):
            assert response.json()["meta_info"]["finish_reason"]["type"] == "abort"


def test_first_token_follows_the_reference(served, model_dir, compressor_dir, long_ids):
    """The next token after a repeat of a compressed prompt, against the independent implementation."""
    ids = long_ids[300:][:REFERENCE_TOKENS]
    options = {"custom_params": {"metasoft_ratio": 8}, SALT: "logprobs"}
    served.server.generate(ids, 2, **options)
    again = served.server.generate(ids, 2, return_logprob=True, top_logprobs_num=5, **options)
    assert metasoft(again)["reused_tokens"] == REFERENCE_TOKENS - WINDOW
    reference = Reference(model_dir, compressor_dir)
    compressed = reference.compress(ids, WINDOW, REFERENCE_TOKENS // 8 - WINDOW, sink=4, targets=4)
    expected = reference.next_token_logprobs(ids, REFERENCE_TOKENS - WINDOW, compressed)
    top = again["meta_info"]["output_top_logprobs"][0]
    errors = [abs(expected[token].item() - logprob) for logprob, token, _ in top]
    print(f"errors of the five largest log-probabilities, bf16 against float32: {[round(e, 3) for e in errors]}")
    assert max(errors) < 0.5 and sum(errors) / len(errors) < 0.25


@pytest.mark.parametrize("backend", BACKENDS)
def test_key_bias_equals_the_reference(start_server, model_dir, compressor_dir, long_ids, tokenizer, tmp_path, backend):
    """The shipped compressor's consolidation: kept entries, moved keys, and room for many at once."""
    ratio, ids = 8, long_ids[300:][:REFERENCE_TOKENS]
    entries = REFERENCE_TOKENS // ratio - WINDOW
    server = start_server(
        *DEVICE_FLAGS, *CHUNKS, "--attention-backend", backend, "--max-total-tokens", str(POOL_TOKENS),
        "--enable-metrics", "--enable-metasoft", "--metasoft-ratio", str(ratio), "--metasoft-path", str(compressor_dir),
        "--metasoft-config", json.dumps({"trace_dir": str(tmp_path), "consolidation": "key_bias"}), env=inside_env(),
    )  # fmt: skip
    response = server.generate(ids, 2, rid="biased")
    assert metasoft(response)["kv_tokens"] == REFERENCE_TOKENS // ratio
    expected = Reference(model_dir, compressor_dir).compress(
        ids, WINDOW, entries, sink=4, targets=4, calibration=calibration_ids(tokenizer)
    )
    assert_entries_follow(expected, tmp_path, "biased")
    for response in ask_all(server, mixed_prompts(long_ids), 16, ratio):
        assert response["meta_info"]["completion_tokens"] == 16
    assert_sound_after_all(server)
    assert_pool_is_whole(server, POOL_TOKENS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp8_kv_cache(start_server, long_ids, backend):
    flags = [*DEVICE_FLAGS, *CHUNKS, "--attention-backend", backend, "--kv-cache-dtype", "fp8_e4m3"]
    flags += ["--max-total-tokens", str(POOL_TOKENS), "--enable-metrics", "--enable-metasoft"]
    server = start_server(*flags, env=inside_env())
    prompts = [long_ids[111 * n :][:1500] for n in range(4)]
    first, again = (ask_all(server, prompts, 8, ratio=4) for _ in range(2))
    assert all(metasoft(response)["kv_tokens"] == 375 for response in first)
    assert all(metasoft(response)["reused_tokens"] == 1500 - WINDOW for response in again)
    assert_sound_after_all(server)
    assert_pool_is_whole(server, POOL_TOKENS)


# A pool without slack, whose freed slots are taken again at once.
STRESS_POOL = 6144
STRESS_FLAGS = [
    *DEVICE_FLAGS, "--max-total-tokens", str(STRESS_POOL), "--enable-metrics", "--enable-metasoft",
    "--no-metasoft-keep-raw", "--attention-backend",
]  # fmt: skip
# On a CPU who shares a batch decides near ties: there one request at a time.
BATCH_INVARIANT, AT_ONCE = ([], 1) if DRY_RUN else (["--enable-deterministic-inference"], None)
RETRACTION = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "40"}


def stress(server, long_ids, at_once: int | None = None) -> list[dict]:
    """Unique prompts, so that nobody meets another's prefix."""
    prompts = [[10 + n, *long_ids[61 * n :][: 700 + 150 * (n % 7)]] for n in range(10 if DRY_RUN else 60)]
    responses = ask_all(server, prompts, 48, ratio=4, at_once=at_once)
    assert all(response["meta_info"]["completion_tokens"] == 48 for response in responses)
    assert sum(metasoft(response)["span_tokens"] > 0 for response in responses) > len(prompts) / 2
    assert_sound_after_all(server)
    assert_pool_is_whole(server, STRESS_POOL)
    return responses


@pytest.mark.parametrize("backend", BACKENDS)
def test_slots_that_are_reused_at_once_keep_every_answer(start_server, long_ids, backend):
    """Stream order and lifetimes, of FlashInfer's own decode plans too: kernels that give the same in every batch, with
    and without the overlap scheduler."""
    runs = []
    for flags in ([], ["--disable-overlap-schedule"]):
        # Whole prompts: where a prompt is cut into chunks depends on who shares its batch.
        flags = [backend, *BATCH_INVARIANT, *flags, "--chunked-prefill-size", "-1"]
        server = start_server(*STRESS_FLAGS, *flags, env=inside_env())
        runs.append([response["output_ids"] for response in stress(server, long_ids, AT_ONCE)])
    different = sum(a != b for a, b in zip(*runs, strict=True))
    print(f"{different} of {len(runs[0])} answers differ between overlap and lockstep")
    assert different == 0


@pytest.mark.parametrize("page", PAGES)
def test_retraction_by_a_small_pool(start_server, long_ids, page):
    flags = [BACKENDS[-1], "--page-size", str(page), "--metasoft-during-prefill", "--metasoft-min-tokens", "128"]
    server = start_server(*STRESS_FLAGS, *flags, *CHUNKS, "--enable-mixed-chunk", env=inside_env() | RETRACTION)
    responses = stress(server, long_ids)
    assert sum(response["meta_info"]["num_retractions"] for response in responses) > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_stages_give_the_same_choice_on_gpu_and_cpu():
    """float32, same input: kept indices equal, merged values close."""
    from sglang_metasoft.types import LayerPool
    from tests.unit.test_not_finite import SPAN, run

    pools = [torch.randn(SPAN, 3, 16), torch.randn(SPAN, 3, 16)]
    results = [run(LayerPool(*(pool.to(device) for pool in pools), 0.25, 1.0, 1.0)) for device in ("cpu", "cuda")]
    (_, here_routes, here, _), (_, there_routes, there, _) = results
    assert torch.equal(here_routes.kept, there_routes.kept.cpu())
    torch.testing.assert_close(here.value, there.value.cpu(), atol=1e-4, rtol=1e-4)
