"""The switch between torch and Triton, in a real server: Triton's kernels run in its interpreter here."""

import json

import pytest
import torch
from safetensors.torch import load_file

from sglang_metasoft.local_server import ServerFailed
from tests.server.checks import SOFT_TOKENS, metasoft

pytestmark = [pytest.mark.server, pytest.mark.slow]  # Triton's interpreter takes minutes

PROMPT_TOKENS, NEW_TOKENS = 160, 4
SETTINGS = {"soft_tokens": 8}
FLAGS = ["--dtype", "float32", *SOFT_TOKENS, "--metasoft-window", "16", "--metasoft-min-tokens", "64"]
ON_GPU = torch.cuda.is_available()


CASES = [("attention_flow", False), ("key_bias", False), ("key_bias", True)]  # the last is the shipped path


@pytest.fixture(scope="module", params=CASES, ids=["attention_flow", "key_bias", "key_bias and an entry scorer"])
def case(request):
    """The consolidation, and whether the compressor is a trained one, with an entry scorer."""
    return request.param


@pytest.fixture(scope="module")
def outcomes(case, compressor_dir, start_server, document_ids, tmp_path_factory):
    """What servers with either kernels chose, wrote and answered, and their start-up lines."""
    results = {}
    for kernels in ("torch", "triton"):
        trace_dir = tmp_path_factory.mktemp(kernels)
        consolidation, is_trained = case
        config = {"kernels": kernels, "trace_dir": str(trace_dir), "consolidation": consolidation}
        config |= {"path": str(compressor_dir)} if is_trained else SETTINGS
        env = {"TRITON_INTERPRET": "1"} if kernels == "triton" and not ON_GPU else {}
        server = start_server(*FLAGS, "--metasoft-config", json.dumps(config), env=env)
        response = server.generate(document_ids[:PROMPT_TOKENS], NEW_TOKENS, rid="kernels")
        assert metasoft(response)["kv_tokens"] == PROMPT_TOKENS // 4
        (trace,) = trace_dir.glob("kernels-*.safetensors")
        (line,) = [line for line in server.log.read_text().splitlines() if "MetaSoft is active" in line]
        results[kernels] = load_file(trace), response["output_ids"], line
    return results


def test_both_keep_the_same_entries_and_give_the_same_answer(outcomes, case):
    (ours, answer, _), (theirs, expected_answer, _) = outcomes["triton"], outcomes["torch"]
    assert torch.equal(ours["kept"], theirs["kept"]) and answer == expected_answer
    close = dict(atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(ours["key"], theirs["key"], **(close if case[0] == "key_bias" else dict(atol=0, rtol=0)))
    torch.testing.assert_close(ours["value"], theirs["value"], **close)


def test_the_start_up_line_says_what_runs(outcomes):
    assert outcomes["torch"][2].endswith("runs on torch")
    assert outcomes["triton"][2].endswith(
        "runs on triton, probe attention included" if ON_GPU else "Triton's interpreter, probe attention included"
    )


@pytest.mark.skipif(ON_GPU, reason="there Triton needs no interpreter")
def test_triton_on_a_cpu_is_refused_at_start_up(start_server):
    with pytest.raises(ServerFailed, match="'triton' is not allowed on the device 'cpu' unless TRITON_INTERPRET=1"):
        start_server(*FLAGS, "--metasoft-config", '{"kernels": "triton"}')
