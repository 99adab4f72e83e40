"""SGLang's own requests, with the state that MetaSoft keeps of them."""

from array import array
from types import SimpleNamespace

from metasoft_patches.cache.prefix_index import FIRST_VIRTUAL_ID
from metasoft_patches.cache.request import RequestState
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.sampling.sampling_params import SamplingParams


def make_prefix(tokens: int, slots: int) -> SimpleNamespace:
    """A prefix of ``slots`` entries that stands for ``tokens`` tokens, as far as a request asks for it."""
    ids = array("q", range(FIRST_VIRTUAL_ID, FIRST_VIRTUAL_ID + slots))
    return SimpleNamespace(tokens=tokens, slots=slots, offset=tokens - slots, virtual_ids=ids)


def make_request(prompt_tokens: int, options: dict | None = None, **fields) -> Req:
    """A request that has just arrived; its ids tell their positions."""
    req = Req("r", "", array("q", range(100, 100 + prompt_tokens)), SamplingParams(custom_params=options), **fields)
    req.metasoft = RequestState(req, {name.removeprefix("metasoft_"): value for name, value in (options or {}).items()})
    return req
