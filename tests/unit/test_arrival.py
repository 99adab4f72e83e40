"""What is refused when a request arrives: ids that nothing could compute, and those that only the server may make."""

import contextlib
from array import array
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("sglang")
from metasoft_patches.adapter import load_adapter
from metasoft_patches.cache.prefix_index import FIRST_VIRTUAL_ID
from sglang.srt.managers.schedule_batch import Req

from sglang_metasoft.config import MetaSoftConfig
from tests.unit.sglang_requests import make_request
from tests.unit.test_prompt_logprobs import SCHEDULER, make_hooks

VOCABULARY = SCHEDULER.model_config.vocab_size


@pytest.mark.parametrize(
    ("an_id", "has_image", "is_refused"),
    [
        (VOCABULARY - 1, False, False),
        (VOCABULARY, False, True),
        (VOCABULARY, True, False),  # a placeholder
        (FIRST_VIRTUAL_ID - 1, True, False),
        (FIRST_VIRTUAL_ID, True, True),
        (FIRST_VIRTUAL_ID, False, True),
        (-1, True, True),
    ],
)
def test_ids_outside_the_vocabulary_are_for_places_of_images_alone(monkeypatch, an_id, has_image, is_refused):
    refused: list[str] = []
    monkeypatch.setattr(Req, "is_prefill_only", False)
    monkeypatch.setattr(Req, "set_finish_with_abort", lambda req, message: refused.append(message))
    req = make_request(900)
    req.origin_input_ids[5] = an_id
    inputs = SimpleNamespace(mm_items=[]) if has_image else None
    recv_req = SimpleNamespace(return_logprob=False, logprob_start_len=-1, mm_inputs=inputs)
    make_hooks(MetaSoftConfig()).request_made(req, SCHEDULER, recv_req)
    expected = f"input_ids: an id is outside the vocabulary; allowed: 0 to {VOCABULARY - 1}"
    assert refused == [expected] * is_refused


@pytest.mark.parametrize("has_image", [True, False])
def test_an_images_place_is_computed_whatever_its_id_and_a_virtual_token_never(has_image):
    """SGLang makes the ids of an image's places from its hash, up to 2^62."""
    req = make_request(900)
    req.full_untruncated_fill_ids = array("q", [*range(100), FIRST_VIRTUAL_ID + 7, 5])
    hooks = make_hooks(MetaSoftConfig())
    hooks.adapter = load_adapter()
    hooks.adapter.set_prefix(req, torch.arange(200), 100)
    req.multimodal_inputs = SimpleNamespace(mm_items=[]) if has_image else None
    batch, computed = SimpleNamespace(reqs=[req]), []
    with contextlib.nullcontext() if has_image else pytest.raises(RuntimeError, match="would compute a virtual token"):
        hooks.prepare_extend(computed.append, batch)
    assert computed == [batch] * has_image
