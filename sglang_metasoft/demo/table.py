"""The demo's output: two answers to one question side by side, and what they mean for memory."""

import textwrap

from sglang_metasoft.demo.conversation import Answer
from sglang_metasoft.demo.questions import Question

LABEL, CELL = 20, 40


def side_by_side(question: Question, full: Answer, compressed: Answer) -> str:
    """The answers with the full and with the compressed cache, and what each held and took."""
    is_compressed = compressed.bypass is None
    lines = ["", *textwrap.wrap(f"Q: {question.text}", LABEL + 2 * CELL)]
    if question.right is not None:
        lines.append(f"   The text says: {question.right}")
    lines += _row("", "full cache", "compressed cache" if is_compressed else "not compressed")
    lines += _row("answer", full.text, compressed.text)
    if question.right is not None:
        lines += _row("right", *("yes" if question.right in answer.text else "NO" for answer in (full, compressed)))
    fewer = f" ({full.entries / compressed.entries:.1f}x fewer)" if is_compressed else ""
    lines += _row("entries held", f"{full.entries:,}", f"{compressed.entries:,}{fewer}")
    lines += _row("cached tokens", f"{full.cached_tokens:,}", f"{compressed.cached_tokens:,}")
    lines += _row("- from compressed", "-", f"{compressed.reused_tokens:,}")
    lines += _row("seconds", f"{full.seconds:.1f}", f"{compressed.seconds:.1f}")
    if not is_compressed:
        lines.append(f"Not compressed: {compressed.bypass} (see docs/troubleshooting.md)")
    return "\n".join(lines)


def memory_effect(pool_tokens: int, prompt_tokens: int, raw: int, compressed: int) -> str:
    """How many such prompts fit a pool.

    Args:
        pool_tokens: the KV pool, and a prompt's length.
        raw, compressed: how many prompts of that length it holds without and with compression.
    """
    return textwrap.fill(
        f"Memory: a KV pool of {pool_tokens:,} tokens (this server's) decodes {raw} such prompts of {prompt_tokens:,} "
        f"tokens at once with the full cache, and {compressed} with the compressed one (computed, as `sglang-metasoft "
        f"doctor` does; not run here).",
        LABEL + 2 * CELL,
    )


def _row(label: str, full: str, compressed: str) -> list[str]:
    """Lines of one row; a cell that is too long goes on in the next line."""
    cells = [
        textwrap.wrap(label, LABEL - 1) or [""],
        *(textwrap.wrap(text, CELL - 2) or [""] for text in (full, compressed)),
    ]
    height = max(map(len, cells))
    padded = [cell + [""] * (height - len(cell)) for cell in cells]
    return [f"{label:{LABEL}}{left:{CELL}}{right}".rstrip() for label, left, right in zip(*padded, strict=True)]
