"""Prompt, Probe -> Probe: parts of the prompt read again behind the probe, so that a refit sees real queries."""

import torch

from sglang_metasoft.types import Embed, Probe, Prompt

RUN_TOKENS = 64
LARGEST_SHARE = 8  # of the span, one part in so many


def with_reread(probe: Probe, prompt: Prompt, embed: Embed, tokens: int) -> Probe:
    """Append the prompt's last tokens and runs spread evenly over the span, at the positions after the probe.

    What follows a document often asks for what the document says, as its repetition does (KVzip, arXiv 2505.23416,
    repeats all of it). The appended tokens see the whole prompt and do not rank it.

    Args:
        probe: ``[t, D]`` tokens that rank.
        prompt: where the tokens are taken from.
        embed: ids to ``[n, D]``.
        tokens: to append, in whole runs of RUN_TOKENS: one at least (the prompt's end), else an eighth of the span at
            most. 0, or a span shorter than a run: none.

    Returns:
        The longer probe, with ``ranking_tokens`` set.
    """
    span_tokens = prompt.span_ids.numel()
    runs = min(tokens, span_tokens // LARGEST_SHARE) // RUN_TOKENS
    if tokens == 0 or span_tokens < RUN_TOKENS:
        return probe
    spread = max(runs, 1) - 1
    starts = [(2 * number + 1) * (span_tokens - RUN_TOKENS) // (2 * spread) for number in range(spread)]
    parts = [prompt.span_ids[start : start + RUN_TOKENS] for start in starts]
    again = embed(torch.cat([*parts, prompt.last_ids(RUN_TOKENS)])).to(probe.embeds.dtype)
    return probe._replace(embeds=torch.cat([probe.embeds, again]), ranking_tokens=probe.embeds.shape[0])
