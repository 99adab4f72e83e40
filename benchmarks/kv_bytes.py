"""Bytes of KV that a prompt holds by token, before and after: counted, not measured, from the sizes of known models.

``kv_models.json`` beside this file has what their published configurations say: layers by kind, KV heads, head size,
window. Entries are 2 bytes a number. A model that is refused has no figure after.

- A ``full`` layer holds every token; after, ``ceil(tokens / ratio)``.
- A ``window`` layer in the same pool holds every token too, though it sees a window alone; a prompt has as many
  entries in each layer of a pool, so that after it all keep at least the window. In a pool of its own
  (``has_window_pool``) such a layer holds its window, before and after.
- A ``recurrent`` layer holds a state that does not grow. A ``latent`` one (MLA) holds one vector for all heads.

    python benchmarks/kv_bytes.py [--prompt-tokens 32768] [--ratios 4 8]
"""

import argparse
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from metasoft_patches import families

MODELS = Path(__file__).with_name("kv_models.json")
PROMPT_TOKENS, RATIOS = 32768, (4, 8)
NUMBER_BYTES = 2  # bfloat16
KINDS = {"full": "full_attention", "window": "sliding_attention", "recurrent": "linear_attention", "latent": "latent"}


class Model(NamedTuple):
    """A published configuration."""

    family: str
    model: str
    class_name: str
    layers: dict[str, int]  # by kind
    entry_bytes: int  # of one layer
    window_tokens: int | None
    has_window_pool: bool

    def why_refused(self) -> str | None:
        """As at a start, by class and layers; None: it is served."""
        types = [KINDS[kind] for kind, count in self.layers.items() for _ in range(count)]
        text = SimpleNamespace(layer_types=types, sliding_window=self.window_tokens)
        config = SimpleNamespace(architectures=[self.class_name])
        return families.why_refused(SimpleNamespace(hf_config=config, hf_text_config=text, model_impl="auto"))

    def held_bytes(self, tokens: int, ratio: float = 1) -> int:
        """What a prompt of so many tokens holds in the KV pools, consolidated at this ratio."""
        window = min(tokens, self.window_tokens or 0)
        kept = math.ceil(tokens / ratio)
        if not self.has_window_pool:
            kept = max(kept, window)
        entries = {"full": kept, "latent": kept, "window": window if self.has_window_pool else kept, "recurrent": 0}
        return self.entry_bytes * sum(count * entries[kind] for kind, count in self.layers.items())


def read_models() -> list[Model]:
    """All of the file."""
    models = []
    for row in json.loads(MODELS.read_text()):
        numbers = row.get("latent_numbers") or 2 * row["kv_heads"] * row["head_size"]
        models.append(
            Model(
                row["family"], row["model"], row["class"], row["layers"], numbers * NUMBER_BYTES,
                row.get("window_tokens"), row.get("has_window_pool", False),
            )
        )  # fmt: skip
    return models


def table(prompt_tokens: int = PROMPT_TOKENS, ratios: tuple[int, ...] = RATIOS) -> str:
    """KiB by token of a prompt of this length, in Markdown."""
    heads = " | ".join(f"at {ratio}×" for ratio in ratios)
    lines = [f"| family | model | layers | KiB a token | {heads} |", "|---" * (4 + len(ratios)) + "|"]
    for model in read_models():
        layers = ", ".join(f"{count} {kind}" for kind, count in model.layers.items())
        before, *after = (
            f"{model.held_bytes(prompt_tokens, ratio) / prompt_tokens / 1024:.4g}" for ratio in (1, *ratios)
        )
        if model.why_refused() is not None:
            after = ["refused"] * len(ratios)
        lines.append(f"| {model.family} | {model.model} | {layers} | {before} | {' | '.join(after)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt-tokens", type=int, default=PROMPT_TOKENS)
    parser.add_argument("--ratios", type=int, nargs="+", default=RATIOS)
    args = parser.parse_args()
    if (least := min(args.prompt_tokens, *args.ratios)) < 1:
        parser.error(f"--prompt-tokens, --ratios: {least} is not allowed; allowed: integers >= 1")
    print(table(args.prompt_tokens, tuple(args.ratios)))


if __name__ == "__main__":
    main()
