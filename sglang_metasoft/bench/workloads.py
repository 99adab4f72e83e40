"""What the servers are asked: arguments of SGLang's own ``sglang.benchmark.serving``, and the pools they run in."""

from typing import NamedTuple

SLACK_TOKENS = 8  # SGLang admits a request only if more than its tokens and a page are free
SHORT_PROMPT_TOKENS = 128  # below min_tokens: nothing of it is compressed
LEAST_RAW_PROMPTS = 4  # that a tight pool holds
CHAT_TURNS = 3


class Size(NamedTuple):
    """How much is sent."""

    prompt_tokens: int
    output_tokens: int
    requests: int

    def pool_tokens(self, pool: str) -> int:
        """A tight pool holds a quarter of the requests raw, four at least; an ample one all of them twice.

        Outputs are not compressed and requests come whole, so four raw ones leave room for fifteen at ratio 4, not
        sixteen; the more requests, the closer to four times as many.
        """
        held = max(self.requests // 4, LEAST_RAW_PROMPTS) if pool == "tight" else 2 * self.requests
        return held * (self.prompt_tokens + self.output_tokens + SLACK_TOKENS)


def long_documents(size: Size) -> list[str]:
    """Different long prompts, all at once."""
    return _random_ids(size.prompt_tokens, size.output_tokens, size.requests)


def one_by_one(size: Size) -> list[str]:
    """The same, one after the other: what a lone request waits."""
    return [*_random_ids(size.prompt_tokens, size.output_tokens, max(size.requests // 4, 3)), "--max-concurrency", "1"]


def shared_document(size: Size) -> list[str]:
    """One long document, a question each."""
    return _shared(size, groups=1, prompts=size.requests, turns=1)


def multi_turn(size: Size) -> list[str]:
    """Chats over a long first message, a turn after the other."""
    groups = max(size.requests // (2 * CHAT_TURNS), 2)
    chats = _shared(size, groups=groups, prompts=2, turns=CHAT_TURNS)
    return [*chats, "--max-concurrency", str(2 * groups), "--backend", "sglang-oai-chat"]


def short_prompts(size: Size) -> list[str]:
    """The control: nothing to compress."""
    return _random_ids(SHORT_PROMPT_TOKENS, size.output_tokens, 2 * size.requests)


WORKLOADS = {
    function.__name__.replace("_", "-"): function
    for function in (long_documents, one_by_one, shared_document, multi_turn, short_prompts)
}
POOLS = ("tight", "ample")


def _random_ids(prompt_tokens: int, output_tokens: int, requests: int) -> list[str]:
    return [
        "--dataset-name", "random-ids", "--random-range-ratio", "1", "--tokenize-prompt",
        "--random-input-len", str(prompt_tokens), "--random-output-len", str(output_tokens),
        "--num-prompts", str(requests),
    ]  # fmt: skip


def _shared(size: Size, groups: int, prompts: int, turns: int) -> list[str]:
    question = max(size.prompt_tokens // 16, 32)
    return [
        "--dataset-name", "generated-shared-prefix", "--gsp-num-groups", str(groups),
        "--gsp-prompts-per-group", str(prompts), "--gsp-num-turns", str(turns), "--num-prompts", str(groups * prompts),
        "--gsp-system-prompt-len", str(size.prompt_tokens - question), "--gsp-question-len", str(question),
        "--gsp-output-len", str(size.output_tokens),
    ]  # fmt: skip
