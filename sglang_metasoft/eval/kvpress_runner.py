"""The same cases through kvpress 0.5.5, so that peers are their authors' own code.

Runs in an environment of its own (``make .venv-kvpress/.installed``), without SGLang:

    PYTHONPATH=. .venv-kvpress/bin/python -m sglang_metasoft.eval.kvpress_runner \
        --model .demo/SmolLM2-135M-Instruct --tasks ruler --modes inside after --output kvpress.jsonl

As in kvpress' pipeline, a press sees the context while it is prefilled, and what follows runs over what is left. The
context is the document and the question (``inside``: kvpress' query-aware setting) or the document alone (``after``);
the chat template's end and the answer's prefix always follow. Presses that work layer by layer share one prefill: each
gets the layer's entries and returns what it keeps. ``compression_ratio`` is 1 - 1 / ratio.

Left out because they load weights or statistics from a model hub, for other models: QFilter, FastKVzip, KVzap,
RestoreKV, LU-KV, DuoAttention. Left out because they compress something else: ThinK (channels), decoding presses.
"""

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import kvpress
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from sglang_metasoft.eval.case import Case, Rendered, render
from sglang_metasoft.eval.commands import add_case_arguments, make_cases
from sglang_metasoft.eval.metrics import FIDELITY, PERPLEXITY
from sglang_metasoft.eval.records import Store, is_settled, make_key, make_record


def equal_budgets(press: kvpress.KVzipPress, model) -> None:
    """A selection for KVzip's scores with as many entries in every head and layer, which is what a paged pool can hold.

    Not of kvpress: it tells what KVzip's unequal budgets are worth.
    """
    scores = press.score_val  # [layers, 1, G, L]
    scores[..., : press.n_sink] = 1.0
    dropped = int(scores.shape[-1] * press.compression_ratio)
    for layer in model.model.layers:
        lowest = scores[layer.self_attn.layer_idx, 0].topk(dropped, largest=False).indices  # [G, dropped]
        heads = torch.arange(len(lowest)).repeat_interleave(dropped)
        layer.self_attn.masked_key_indices = (torch.zeros_like(heads), heads, lowest.flatten().cpu())


# Settings of kvpress' own evaluation registry.
LAYERWISE: dict[str, Callable[[], kvpress.BasePress]] = {
    "snapkv": kvpress.SnapKVPress,
    "adakv_snapkv": lambda: kvpress.AdaKVPress(kvpress.SnapKVPress()),
    "critical_snapkv": lambda: kvpress.CriticalKVPress(kvpress.SnapKVPress()),
    "critical_adakv_snapkv": lambda: kvpress.CriticalAdaKVPress(kvpress.SnapKVPress()),
    "expected_attention": lambda: kvpress.AdaKVPress(kvpress.ExpectedAttentionPress(epsilon=1e-2)),
    "expected_attention_uniform": kvpress.ExpectedAttentionPress,
    "critical_adakv_expected_attention": lambda: kvpress.CriticalAdaKVPress(
        kvpress.ExpectedAttentionPress(use_vnorm=False)
    ),
    "pyramidkv": kvpress.PyramidKVPress,
    "chunkkv": lambda: kvpress.ChunkKVPress(press=kvpress.SnapKVPress(), chunk_length=20),
    "tova": kvpress.TOVAPress,
    "keydiff": kvpress.KeyDiffPress,
    "knorm": kvpress.KnormPress,
    "lagkv": kvpress.LagKVPress,
    "compactor": kvpress.CompactorPress,
    "merging_snapkv": lambda: kvpress.MergingPress(kvpress.SnapKVPress()),
    "streaming_llm": kvpress.StreamingLLMPress,
}
WHOLE: dict[str, Callable[[], kvpress.BasePress]] = {
    "kvzip": kvpress.KVzipPress,
    "kvzip_plus": lambda: kvpress.KVzipPress(kvzip_plus_normalization=True),
    "kvcompose": kvpress.KVComposePress,
    "kvcompose_unstructured": lambda: kvpress.KVComposePress(structured=False),
}
# Other selections over a press' scores: the press, and the selection.
RESELECTED = {"kvzip_equal_budgets": ("kvzip", equal_budgets)}
PRESSES = [*LAYERWISE, *WHOLE, *RESELECTED]


class Kept:
    """What a press left: entries of all layers, and masked indices where a press only pretends to drop them."""

    def __init__(self) -> None:
        self.entries: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.masks: list[tuple | None] = []

    @property
    def shape(self) -> tuple:
        """What caches that decode as one batch have in common: entries of each layer, and whether some are masked."""
        return *(keys.shape[2] for keys, _ in self.entries), any(mask is not None for mask in self.masks)

    def entries_per_head(self, num_kv_heads: int) -> float:
        """Mean number of entries that count, over layers and heads."""
        counts = [
            keys.shape[2] - (0 if mask is None else len(mask[2]) / num_kv_heads)
            for (keys, _), mask in zip(self.entries, self.masks, strict=True)
        ]
        return sum(counts) / len(counts)


def batched(rows: list[Kept], model) -> DynamicCache:
    """A cache of its own with a row for each, and the masks put where kvpress looks for them."""
    cache = DynamicCache()
    for index, layer in enumerate(model.model.layers):
        keys, values = (torch.cat(parts) for parts in zip(*(row.entries[index] for row in rows), strict=True))
        cache.update(keys, values, index)
        masks = [(row, mask) for row, kept in enumerate(rows) if (mask := kept.masks[index]) is not None]
        layer.self_attn.masked_key_indices = (
            tuple(
                torch.cat(parts)
                for parts in zip(
                    *((torch.full_like(heads, row), heads, places) for row, (_, heads, places) in masks), strict=True
                )
            )
            if masks
            else None
        )
    return cache


class Shared(kvpress.BasePress):
    """Lets many layer-by-layer presses look at one prefill; the cache itself stays whole.

    What a press draws at random (Compactor) depends on ``seed`` and the layer alone.
    """

    def __init__(self, presses: dict[tuple[str, float], kvpress.BasePress], seed: int) -> None:
        self.presses, self.seed = presses, seed
        self.kept = {key: Kept() for key in presses}

    def post_init_from_model(self, model) -> None:
        for press in self.presses.values():
            press.post_init_from_model(model)

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        for key, press in self.presses.items():
            module.masked_key_indices = None
            torch.manual_seed(self.seed + module.layer_idx)
            left = press.compress(module, hidden_states, keys.clone(), values.clone(), attentions, kwargs)
            self.kept[key].entries.append(left)
            self.kept[key].masks.append(module.masked_key_indices)
        module.masked_key_indices = None
        return keys, values


class Runner:
    """Answers cases with kvpress' presses."""

    def __init__(self, model_path: Path, names: list[str], ratios: list[float], modes: list[str], store: Store) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model_path)
        self.model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32, attn_implementation="sdpa")
        self.model.eval()
        self.names, self.ratios, self.modes, self.store = names, ratios, modes, store
        end = self.model.generation_config.eos_token_id
        self.end_ids = {*(end if isinstance(end, list) else [end]), self.tokenizer.eos_token_id}

    def run(self, cases: list[Case]) -> None:
        """Answer what the store lacks."""
        for case in tqdm(cases, unit="case", desc="kvpress"):
            for turn in range(len(case.turns)):
                prompt = render(case, turn, self.tokenizer)
                for mode in self.modes:
                    if case.metric != PERPLEXITY and (mode == "after" or turn == 0):
                        self._answer(case, turn, mode, prompt)

    @torch.no_grad()
    def _answer(self, case: Case, turn: int, mode: str, prompt: Rendered) -> None:
        missing = [
            (name, ratio)
            for name in self.names
            for ratio in self.ratios
            if make_key(case, turn, mode, f"kvpress/{name}", ratio) not in self.store
        ]
        if not missing:
            return
        cut = prompt.boundary_tokens if mode == "after" else prompt.question_end_tokens
        context = torch.tensor([prompt.ids[:cut]])
        groups: dict[tuple, list[tuple[tuple[str, float], Kept]]] = {}
        for label, kept in self._compress(context, missing, seed=1000 * case.seed + case.index):
            groups.setdefault(kept.shape, []).append((label, kept))
        for group in groups.values():
            cache = batched([kept for _, kept in group], self.model)
            texts = self._continue(case, turn, cache, prompt.ids[cut:], cut, len(group))
            for ((name, ratio), kept), text in zip(group, texts, strict=True):
                entries = kept.entries_per_head(self.model.config.num_key_value_heads) + len(prompt.ids) - cut
                record = make_record(
                    case, turn, mode, f"kvpress/{name}", ratio, prompt_tokens=len(prompt.ids),
                    kv_tokens=round(entries), runner="kvpress", model=Path(self.model.config.name_or_path).name,
                    prediction=text,
                )  # fmt: skip
                self.store.add(record)

    def _compress(self, context: torch.Tensor, wanted: list[tuple[str, float]], seed: int):
        layerwise = {}
        for name, ratio in wanted:
            if name in LAYERWISE:
                press = LAYERWISE[name]()
                press.compression_ratio = 1 - 1 / ratio
                layerwise[name, ratio] = press
        if layerwise:
            shared = Shared(layerwise, seed)
            with shared(self.model):
                self.model.model(input_ids=context, past_key_values=DynamicCache())
            yield from shared.kept.items()
        by_press: dict[str, list[tuple[str, float]]] = {}
        for name, ratio in wanted:
            if name not in LAYERWISE:
                by_press.setdefault(RESELECTED[name][0] if name in RESELECTED else name, []).append((name, ratio))
        for name, selections in by_press.items():
            yield from self._compress_whole(name, selections, context).items()

    def _compress_whole(
        self, name: str, selections: list[tuple[str, float]], context: torch.Tensor
    ) -> dict[tuple[str, float], Kept]:
        """One scoring of the press, then each selection."""
        press, cache, kept = WHOLE[name](), DynamicCache(), {}
        press.compression_ratio = 1 - 1 / selections[0][1]
        is_kvzip = isinstance(press, kvpress.KVzipPress)
        select = press.compress_post if is_kvzip else press.compress_cache

        def select_all(model):
            tokens = context.shape[1]
            whole = [(layer.keys[:, :, :tokens], layer.values[:, :, :tokens]) for layer in cache.layers]
            for label, ratio in selections:
                press.compression_ratio = 1 - 1 / ratio
                mine = DynamicCache()
                for layer, entries in enumerate(whole):
                    mine.update(*entries, layer)
                    model.model.layers[layer].self_attn.masked_key_indices = None
                if not is_kvzip:
                    press._register_cache(mine)
                    press.prepare_important_masks()
                if label in RESELECTED:
                    RESELECTED[label][1](press, model)
                else:
                    select(model)
                found = kept[label, ratio] = Kept()
                found.entries = [(layer.keys, layer.values) for layer in mine.layers]
                found.masks = [layer.self_attn.masked_key_indices for layer in model.model.layers]

        setattr(press, "compress_post" if is_kvzip else "compress_cache", select_all)
        with press(self.model):
            self.model.model(input_ids=context, past_key_values=cache)
        return kept

    def _continue(
        self, case: Case, turn: int, cache: DynamicCache, ids: list[int], position: int, rows: int
    ) -> list[str]:
        """Run ``ids`` over each row of the cache at logical ``position``, then decode greedily as kvpress does."""
        answers: list[list[int]] = [[] for _ in range(rows)]
        texts, is_over = [""] * rows, [False] * rows
        lengths = {layer.keys.shape[2] for layer in cache.layers}
        if len(lengths) > 1:  # transformers makes one mask for all layers, and none for a single token
            for token in ids[:-1]:
                self._step(torch.tensor([[token]]).expand(rows, -1), position, cache)
                position += 1
        feed = torch.tensor([ids if len(lengths) == 1 else ids[-1:]]).expand(rows, -1)
        for _ in range(max(case.max_new_tokens, 1)):
            logits = self._step(feed, position, cache)
            position += feed.shape[1]
            feed = logits[:, -1].argmax(-1, keepdim=True)
            for row, token in enumerate(feed[:, 0].tolist()):
                if not is_over[row]:
                    answers[row].append(token)
                    texts[row] = self.tokenizer.decode(answers[row], skip_special_tokens=True)
                    is_over[row] = token in self.end_ids or is_settled(case, turn, texts[row])
            if all(is_over):
                break
        return texts

    def _step(self, ids: torch.Tensor, position: int, cache: DynamicCache) -> torch.Tensor:
        """``[rows, 1, vocabulary]`` logits after ``ids`` ``[rows, tokens]``."""
        positions = torch.arange(position, position + ids.shape[1])[None]
        return self.model(input_ids=ids, past_key_values=cache, position_ids=positions, logits_to_keep=1).logits


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--presses", nargs="+", default=list(PRESSES), help=f"of {', '.join(PRESSES)}")
    add_case_arguments(parser)
    args = parser.parse_args()
    logging.getLogger("kvpress").setLevel(logging.ERROR)
    try:
        for name in args.presses:
            if name not in PRESSES:
                raise ValueError(f"press {name!r} is unknown; allowed: {', '.join(PRESSES)}")
        modes = [mode for mode in args.modes if mode != "repeat"]  # here every question runs over compressed entries
        ratios = [ratio for ratio in args.ratios if ratio != 1]
        runner = Runner(args.model, args.presses, ratios, modes, Store(args.output))
        cases = make_cases(args, runner.tokenizer)
        if followed := {case.task for case in cases if case.metric == FIDELITY}:
            raise ValueError(
                f"--tasks: {min(followed)!r} is for eval and eval-hf alone; allowed: tasks with a true answer"
            )
        runner.run(cases)
    except ValueError as error:
        print(f"kvpress_runner: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
