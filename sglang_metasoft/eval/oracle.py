"""The oracle: entries ranked by the attention that the answer pays them. An upper bound, not a method."""

import torch

from sglang_metasoft.methods.base import Method
from sglang_metasoft.types import Probe, Prompt, Scores


class Oracle(Method):
    """Observes the prompt's last token and the answer, which follow the span in their own places.

    The answer is the true one; where the measure is fidelity, the full cache's own. Known to the in-process runner
    alone: a server does not know the answer.
    """

    default_consolidation = "none"

    def observe(self, between_ids: list[int], answer_ids: list[int]) -> None:
        """Set what follows the span of the next prompts: the rest of the prompt, then the answer."""
        self.between_ids, self.answer_ids = between_ids, answer_ids

    def probe(self, prompt: Prompt) -> Probe:
        span_tokens = prompt.span_ids.numel()
        ids = torch.tensor(self.between_ids + self.answer_ids, device=self.device)
        return Probe(self.embed(ids), context_slots=span_tokens, first_position=span_tokens)

    def score(self, q, k_buffer, span_slots, lse, scale, k_scale) -> Scores:
        last = len(self.answer_ids) + 1
        return super().score(q[-last:], k_buffer, span_slots, lse[-last:], scale, k_scale)
