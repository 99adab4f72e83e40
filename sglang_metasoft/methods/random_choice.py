"""Random choice (arXiv 2609.03430), the control: a method is worth what it keeps above this."""

import torch

from sglang_metasoft.methods.base import Method
from sglang_metasoft.types import LayerView, Probe, Prompt, Scores

HASH_BITS = 24  # what a float32 tells apart
LOW_BITS = 2**32 - 1
ODD = 0x9E3779B1  # these are the multipliers and shifts of well-known integer hashes
MULTIPLIERS = (0x7FEB352D, 0x846CA68B)


class RandomChoice(Method):
    """Every layer and KV head keeps entries drawn uniformly, each its own.

    A draw is a hash of the span's token ids, the layer, the head's number in the model and the entry's place. So the
    same span has the same entries kept wherever and however often it is compressed, whatever follows it.

    The window's tokens run once more, for consolidations alone: they tell what an entry stands for, as with SnapKV.
    The paper draws among what a model has generated, and leaves the prompt as it is.
    """

    default_consolidation = "none"

    def probe(self, prompt: Prompt) -> Probe:
        return super().probe(prompt)._replace(method_inputs=hash_of(prompt.span_ids))

    def score_layer(self, view: LayerView) -> Scores:
        mass = super().score_layer(view).importance
        groups, span = mass.shape
        place = torch.arange(span, device=mass.device)
        head = view.first_kv_head + torch.arange(groups, device=mass.device).unsqueeze(1)
        draw = mixed(mixed(mixed(view.job.probe.method_inputs + view.layer) + head) + place)  # [G, S]
        return Scores((draw >> (32 - HASH_BITS)).float() / 2**HASH_BITS, mass)


def mixed(x: torch.Tensor) -> torch.Tensor:
    """An int64 tensor's low 32 bits, stirred so that each of them sways all."""
    x = x * ODD & LOW_BITS
    for multiplier in MULTIPLIERS:
        x = (x ^ (x >> 16)) * multiplier & LOW_BITS
    return x ^ (x >> 16)


def hash_of(ids: torch.Tensor) -> torch.Tensor:
    """``[n]`` int64 token ids, in their order, to an int64 scalar from 0 to 2**32 - 1; does not wait for the device."""
    place = torch.arange(ids.numel(), device=ids.device)
    return mixed(mixed(mixed(place) + ids).sum())
