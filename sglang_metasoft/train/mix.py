"""Which kinds of task training prompts are drawn from, and how often."""

from sglang_metasoft.train import generators, requests
from sglang_metasoft.train.cases import Generator

GENERATORS: dict[str, tuple[Generator, float]] = {  # with shares of the mix
    "everyday": (requests.everyday, 0.38),
    "conversation": (requests.conversation, 0.06),
    "labels": (requests.labels, 0.05),
    "needles": (generators.needles, 0.20),
    "records": (generators.records, 0.10),
    "pairs": (generators.pairs, 0.08),
    "copying": (generators.copying, 0.07),
    "gaps": (generators.gaps, 0.06),
}
