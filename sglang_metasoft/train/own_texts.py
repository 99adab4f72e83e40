"""Texts that are there without a download: what ships, what Python brings, and what the model writes itself."""

import random
import sysconfig
from importlib import metadata
from pathlib import Path

import torch

from sglang_metasoft.data import DOCUMENT
from sglang_metasoft.hf.cache import Batch
from sglang_metasoft.train.backbone import Backbone
from sglang_metasoft.train.cases import chat_template
from sglang_metasoft.train.words import ADJECTIVES, JOBS, NOUNS, PLACES

MIN_CHARS = 2500
SOURCE_FILES = 60
TOP_P = 0.95
KINDS = (
    "report", "letter", "short story", "travel guide", "news article", "manual", "lecture", "product review", "diary",
    "contract", "set of meeting notes", "interview", "recipe collection", "biography", "list of frequent questions",
)  # fmt: skip


def found_here() -> list[str]:
    """Prose and code of this installation: the shipped document, Python's help topics, the descriptions of installed
    packages, and some modules of the standard library. The same on machines with the same packages.
    """
    texts = [DOCUMENT.read_text()]
    try:
        from pydoc_data.topics import topics

        texts += ["\n\n".join(topics[name] for name in sorted(topics))]
    except ImportError:  # some distributions leave it out
        pass
    described = {dist.metadata["Name"]: dist.metadata.json.get("description") for dist in metadata.distributions()}
    texts += [text for _, text in sorted(described.items(), key=lambda item: str(item[0])) if isinstance(text, str)]
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts += [
        path.read_text(errors="replace") for path in random.Random(0).sample(sources, min(SOURCE_FILES, len(sources)))
    ]
    return [text for text in texts if len(text) >= MIN_CHARS]


@torch.no_grad()
def written_by(backbone: Backbone, count: int, tokens: int, seed: int) -> list[str]:
    """Documents that the model writes: sampled, not greedy, several at a time.

    Args:
        count: documents.
        tokens: most of each.
    """
    rng = random.Random(f"{seed}:documents")
    before, after, _ = chat_template(backbone.tokenizer)
    prompts = [
        f"Write a long {rng.choice(KINDS)} about a {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}, a {rng.choice(JOBS)} "
        f"and the town of {rng.choice(PLACES)}. Use many details, names and numbers."
        for _ in range(count)
    ]
    ids = [backbone.encode(before + prompt + after) for prompt in prompts]
    prefilled = [backbone.prefill(one) for one in ids]
    generator = torch.Generator(device=backbone.device).manual_seed(seed)
    batch = Batch(backbone, [one.layers for one in prefilled], tokens)
    logits = torch.stack([one.logits for one in prefilled])
    start = backbone.tensor([len(one) for one in ids])
    rows: list[list[int]] = [[] for _ in ids]
    alive = list(range(count))
    for step in range(tokens):
        drawn = draw(logits, generator).tolist()
        for place, row in enumerate(alive):
            rows[row].append(drawn[place])
        going = [place for place, token in enumerate(drawn) if token not in backbone.end_ids]
        if not going or step == tokens - 1:
            break
        if len(going) < len(alive):
            batch.keep(torch.tensor(going, dtype=torch.int64))
            alive = [alive[place] for place in going]
        last = backbone.tensor([[rows[row][-1]] for row in alive])
        logits = batch.extend(last, start[alive] + step, last=1)[:, -1]
    return [backbone.tokenizer.decode(row, skip_special_tokens=True) for row in rows]


def draw(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """``[rows]`` tokens from ``[rows, vocabulary]`` logits, of the most likely ones that make up ``TOP_P``."""
    probabilities, order = logits.softmax(-1).sort(-1, descending=True)
    probabilities[probabilities.cumsum(-1) - probabilities > TOP_P] = 0
    return order.gather(-1, torch.multinomial(probabilities, 1, generator=generator))[:, 0]
