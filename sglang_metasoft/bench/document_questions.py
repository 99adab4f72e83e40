"""Twenty questions about one long document, each with one right answer: a made-up fact in real text."""

from sglang_metasoft.data import DOCUMENT
from sglang_metasoft.local_server import Server

DOCUMENT_TOKENS, QUESTIONS = 6000, 20
POOL_TOKENS = 11_000  # less than the raw document twice
PLACES = (
    "Lisbon", "Oslo", "Cairo", "Lima", "Quito", "Dakar", "Hanoi", "Perth", "Turin", "Osaka",
    "Kyiv", "Delhi", "Tunis", "Sofia", "Riga", "Porto", "Nice", "Bonn", "Graz", "Cork",
)  # fmt: skip


def make_document(tokenizer) -> tuple[str, dict[str, str]]:
    """The text with the facts spread over it, and the facts."""
    facts = {place: str(10_000 + 4_321 * (number + 1)) for number, place in enumerate(PLACES[:QUESTIONS])}
    sentences = [f"\nThe key to {place} is {key}.\n" for place, key in facts.items()]
    ids = tokenizer(DOCUMENT.read_text())["input_ids"]
    room = DOCUMENT_TOKENS - len(tokenizer("".join(sentences))["input_ids"])
    ids = (ids + ids)[:room]
    part = room // QUESTIONS
    parts = [tokenizer.decode(ids[n * part : (n + 1) * part]) for n in range(QUESTIONS)]
    return "".join(text + sentence for text, sentence in zip(parts, sentences, strict=True)), facts


def make_prompts(tokenizer) -> tuple[list[list[int]], list[str], int]:
    """Token ids of each prompt, its answer, and how many tokens all prompts have in common."""
    document, facts = make_document(tokenizer)
    prompts = []
    for place in facts:
        text = f"{document}\n\nWhat is the key to {place}? Answer with the number alone."
        messages = [{"role": "user", "content": text}]
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompts.append(tokenizer(rendered + f"The key to {place} is", add_special_tokens=False)["input_ids"])
    shared = next(n for n, column in enumerate(zip(*prompts, strict=False)) if len(set(column)) > 1)
    return prompts, list(facts.values()), shared


def ask_all(server: Server, prompts: list[list[int]], answers: list[str], shared: int, salted: bool) -> dict:
    """Ask one after the other.

    Args:
        shared: tokens that all prompts begin with.
        salted: a ``cache_salt`` for each, so that nothing is shared.

    Returns:
        How many answers are right, prompt tokens computed after the first question, and those that are questions' own.
    """
    responses = []
    for number, prompt in enumerate(prompts):
        fields = {"cache_salt": f"question {number}"} if salted else {}
        responses.append(server.generate(prompt, 16, **fields))
    metas = [response["meta_info"] for response in responses]
    later = list(zip(prompts, metas, strict=True))[1:]
    own = sum(len(prompt) - shared for prompt, _ in later)
    computed = sum(meta["prompt_tokens"] - meta["cached_tokens"] for _, meta in later)
    return {
        "right": sum(answer in response["text"] for answer, response in zip(answers, responses, strict=True)),
        "questions": len(prompts),
        "output_ids": [response["output_ids"] for response in responses],
        "computed_after_first": computed,
        "own_tokens_after_first": own,
        "computed_over_own": round(computed / own, 3),
        "kv_tokens": [meta.get("metasoft_kv_tokens") for meta in metas],
        "bypassed": [meta["metasoft_bypass"] for meta in metas if "metasoft_bypass" in meta],
    }
