"""Which case comes when: a pure function of the seed and the number, so that training can be resumed anywhere."""

import math
import random

from sglang_metasoft.train.cases import Case, Task, continuation_case, to_case
from sglang_metasoft.train.generators import sentences_of
from sglang_metasoft.train.mix import GENERATORS
from sglang_metasoft.train.requests import EARLIER, code, is_code
from sglang_metasoft.train.texts import Chat, HeldOut, passage

CONTINUATION_SHARE = 0.10
CHAT_SHARE = 0.35  # of the cases, where the data has chats
LONG_SHARE = 0.10
CHAT_TEMPLATE_SHARE = 0.85  # of the tasks; the others are plain text
SECOND_TURN_SHARE = 0.2  # of those in a chat template: asked after an earlier question and its answer
CHARS_PER_TOKEN = 4.2
ATTEMPTS = 20


class Dataset:
    """Endless cases from texts and chats.

    Args:
        tokenizer: of the model.
        texts, chats: from :func:`sglang_metasoft.train.texts.read_corpus`.
        lengths: fewest and most tokens of a prefix; one in ten may have three times as many.
        repeat_share: share of cases whose prefix is also repeated, for question-after targets.
        seed: of everything random.
        held_out: passages that share a run of words with it are passed over.
    """

    def __init__(
        self,
        tokenizer,
        texts: list[str],
        chats: list[Chat],
        *,
        lengths: tuple[int, int],
        window: int,
        repeat_share: float,
        answer_tokens: int,
        seed: int,
        held_out: HeldOut | None = None,
    ) -> None:
        self.tokenizer, self.texts, self.chats = tokenizer, texts, chats
        self.lengths, self.window, self.repeat_share = lengths, window, repeat_share
        self.answer_tokens, self.seed = answer_tokens, seed
        self.held_out = held_out or HeldOut()

    def __getitem__(self, number: int) -> Case:
        """Case ``number``; the same whenever it is asked for.

        Raises:
            ValueError: the data yields no case of the wanted lengths.
        """
        rng = random.Random(f"{self.seed}:{number}")
        for _ in range(ATTEMPTS):
            shortest, longest = self.lengths
            if rng.random() < LONG_SHARE:
                shortest, longest = longest, 3 * longest
            tokens = round(math.exp(rng.uniform(math.log(shortest), math.log(longest))))
            case = self._case(rng, tokens)
            if case is not None and self.lengths[0] * 0.7 <= len(case.prefix) <= 3.2 * self.lengths[1]:
                return case
        raise ValueError(
            f"training data: no case of {self.lengths[0]} to {3 * self.lengths[1]} tokens in {ATTEMPTS} attempts; "
            "allowed: texts or chats at least that long, and not held out"
        )

    def _case(self, rng: random.Random, tokens: int) -> Case | None:
        if self.chats and (not self.texts or rng.random() < CHAT_SHARE):
            return self._chat(rng)
        haystack = passage(rng, self.texts, round(tokens * CHARS_PER_TOKEN))
        if self.held_out.overlaps(haystack):
            return None
        if rng.random() < CONTINUATION_SHARE:
            ids = self.tokenizer(haystack, add_special_tokens=False)["input_ids"]
            return continuation_case("continuation", ids, self.window, self.answer_tokens)
        names = list(GENERATORS)
        name = rng.choices(names, [GENERATORS[n][1] for n in names])[0]
        task: Task = code(rng, haystack) if is_code(haystack) else GENERATORS[name][0](rng, haystack)
        chat = rng.random() < CHAT_TEMPLATE_SHARE
        earlier = None
        if chat and rng.random() < SECOND_TURN_SHARE:
            earlier = rng.choice(EARLIER), rng.choice(sentences_of(haystack) or [haystack])
        return to_case(self.tokenizer, task, chat=chat, repeat=rng.random() < self.repeat_share, earlier=earlier)

    def _chat(self, rng: random.Random) -> Case | None:
        """A conversation up to its last user message, which is the question; the model itself answers."""
        messages = rng.choice(self.chats)
        if any(self.held_out.overlaps(message["content"]) for message in messages):
            return None
        last = max(n for n, message in enumerate(messages) if message["role"] == "user")
        before = messages[:last] or messages[:1]
        text = self.tokenizer.apply_chat_template(messages[: last + 1], tokenize=False, add_generation_prompt=True)
        question_at = text.rfind(messages[last]["content"])
        if not messages[:last]:  # one long message: its last quarter is the question
            question_at += len(before[0]["content"]) * 3 // 4
        prefix, question = (
            self.tokenizer(part, add_special_tokens=False)["input_ids"]
            for part in (text[:question_at], text[question_at:])
        )
        return Case("chat", prefix[-3 * self.lengths[1] :], [question], [None], [], 0)
