"""Answers of a Hugging Face model in process: one prefill a case, every method and ratio compresses that cache.

The stages are the server's own (:mod:`sglang_metasoft.hf.compress`), so the
numbers are those of a server, several times cheaper: the prompt is computed once, and all compressed caches of a case
decode as one batch.
"""

import dataclasses
import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sglang_metasoft.config import MetaSoftConfig, read_config_json
from sglang_metasoft.eval.case import MODES, Case, Rendered, answered, render
from sglang_metasoft.eval.fidelity import Reading
from sglang_metasoft.eval.metrics import FIDELITY, PERPLEXITY
from sglang_metasoft.eval.oracle import Oracle
from sglang_metasoft.eval.records import FULL, Store, is_settled, make_key, make_record
from sglang_metasoft.eval.teacher_forcing import read
from sglang_metasoft.eval.variants import VARIANTS
from sglang_metasoft.hf.cache import Batch, generate, joined
from sglang_metasoft.hf.compress import compress, probe_of
from sglang_metasoft.hf.model import HFModel, LayerKV, Prefilled
from sglang_metasoft.methods.auto import serve
from sglang_metasoft.methods.base import Method
from sglang_metasoft.pipeline.plan import plan_span
from sglang_metasoft.types import MergedKV, Plan

logger = logging.getLogger(__name__)

USAGE = "NAME[+CONSOLIDATION][:SETTING=VALUE,...][@PATH]"
NAMED_PARTS = ("method", "consolidation", "path")


@dataclasses.dataclass(frozen=True)
class MethodSpec:
    """A method as the command line names it, :data:`USAGE`.

    Settings are those of ``--metasoft-config``, their values JSON.

    Raises:
        ValueError: an unknown setting, one that has a place of its own, or a value out of its range.
    """

    label: str
    name: str
    consolidation: str | None = None
    path: str | None = None
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> "MethodSpec":
        head, _, path = text.partition("@")
        head, _, pairs = head.partition(":")
        name, _, consolidation = head.partition("+")
        settings: dict[str, Any] = {}
        for pair in pairs.split(",") if pairs else ():
            key, _, value = pair.partition("=")
            if key in NAMED_PARTS:
                raise ValueError(f"method {text!r}: {key} has a place of its own; allowed: {USAGE}")
            settings |= read_config_json(f"{{{json.dumps(key)}: {value}}}")
        return cls(text, name, consolidation or None, path or None, settings)


class Compressor:
    """One method on one model.

    Raises:
        ValueError: an unknown method or consolidation, or a method that cannot serve the model.
    """

    def __init__(self, model: HFModel, spec: MethodSpec) -> None:
        settings = {"consolidation": spec.consolidation, "path": spec.path, **spec.settings}
        variant = VARIANTS.get(spec.name)
        self.config = MetaSoftConfig(method="metasoft" if variant else spec.name, **settings)
        self.spec, self.model = spec, model
        if variant:
            self.method: Method = variant(self.config, model.shape, model.embed, model.device)
            self.method.prepare(model)
            return
        served = serve(self.config, model.shape, model.embed, model.device, model)
        self.method, self.config = served.method, served.method.config
        logger.info("%s: %s", spec.label, served.origin)
        for warning in served.warnings:
            logger.warning("%s", warning)

    def compress(
        self, entries: list[LayerKV], ids: list[int], plans: list[Plan], answer_ids: list[int]
    ) -> list[list[MergedKV]]:
        """Compress a prompt's span as each plan says; all plans have the same span.

        Args:
            entries: of the whole prompt.
            ids: of the whole prompt.
            answer_ids: the true answer, or the full cache's where that is the measure, for the oracle alone.

        Returns:
            For each plan and layer the consolidated entries ``[B, G, d]``.
        """
        if isinstance(self.method, Oracle):
            self.method.observe(ids[plans[0].span_tokens :], answer_ids)
        probe = probe_of(self.model, ids, plans[0], self.method)
        results = compress(self.model, entries, probe, plans, self.method)
        return [[merged for _, merged in layers] for layers in results]


class HFRunner:
    """Answers cases with all methods and ratios at once.

    Args:
        ratios: above 1; the full cache is always answered too.
        modes: ``inside`` (first run of the whole prompt), ``repeat`` (its second run, whose last token is computed over
            the compressed span and the first run's window), ``after`` (question after the compressed document).
    """

    def __init__(self, model: HFModel, specs: list[MethodSpec], ratios: list[float], modes: list[str], store: Store):
        self.model, self.ratios, self.modes, self.store = model, ratios, modes, store
        self.compressors = [Compressor(model, spec) for spec in specs]

    def run(self, cases: list[Case]) -> None:
        """Answer what the store lacks; one progress bar."""
        for case in tqdm(cases, unit="case", desc="hf"):
            for turn in range(len(case.turns)):
                text = self._answer(case, turn)
                if text is not None:
                    case = answered(case, turn, text)  # noqa: PLW2901

    def _wanted(self, case: Case, turn: int, mode: str) -> list[tuple[Compressor, list[float]]]:
        wanted = []
        for compressor in self.compressors:
            ratios = [
                ratio
                for ratio in self.ratios
                if make_key(case, turn, mode, compressor.spec.label, ratio) not in self.store
            ]
            if ratios:
                wanted.append((compressor, ratios))
        return wanted

    def _answer(self, case: Case, turn: int) -> str | None:
        """Answer a turn; the full cache's answer where later turns stand on that."""
        # A turn's prompt holds earlier turns, and a book's scored part follows its document: only "after" fits both.
        modes = [mode for mode in self.modes if mode == "after" or (turn == 0 and case.metric != PERPLEXITY)]
        wanted = {mode: self._wanted(case, turn, mode) for mode in modes}
        full_missing = [mode for mode in modes if make_key(case, turn, mode, FULL, 1) not in self.store]
        if not full_missing and not any(wanted.values()):
            stored = [self.store.get(make_key(case, turn, mode, FULL, 1)) for mode in modes]
            return stored[0]["prediction"] if case.metric == FIDELITY and stored and stored[0] else None
        prompt = render(case, turn, self.model.tokenizer)
        prefilled = self.model.prefill(prompt.ids)
        if case.metric == FIDELITY:
            return self._follow(case, turn, prompt, prefilled, wanted)
        if full_missing:
            cut = prompt.boundary_tokens if case.metric == PERPLEXITY else len(prompt.ids)
            rows = [[LayerKV(kv.key[:cut], kv.value[:cut]) for kv in prefilled.layers]]
            (fields,) = self._continue(case, turn, rows, prompt, cut, prefilled)
            for mode in full_missing:
                self._add(case, turn, mode, FULL, 1.0, prompt, len(prompt.ids), fields)
        for mode, compressors in wanted.items():
            self._answer_compressed(case, turn, mode, compressors, prompt, prefilled, self._answer_ids(case, turn))
        return None

    def _follow(self, case, turn, prompt: Rendered, prefilled: Prefilled, wanted) -> str:
        """Let every cache read the full cache's answer; its text."""
        stored = next(filter(None, (self.store.get(make_key(case, turn, mode, FULL, 1)) for mode in MODES)), None)
        if stored:
            ids = stored["answer_ids"]
        else:
            batch = Batch(self.model, [prefilled.layers], case.max_new_tokens)
            (ids,) = generate(batch, [prefilled.logits.argmax().item()], len(prompt.ids), case.max_new_tokens)
        text = self.model.tokenizer.decode(ids, skip_special_tokens=True)
        for mode, compressors in wanted.items():
            if make_key(case, turn, mode, FULL, 1) not in self.store:
                cut = _end(prompt, mode)
                row = [LayerKV(kv.key[:cut], kv.value[:cut]) for kv in prefilled.layers]
                (reading,) = read(self.model, [row], prompt.ids[cut:], cut, ids)
                fields = {"prediction": text, "answer_ids": ids, **reading.fields()}
                self._add(case, turn, mode, FULL, 1.0, prompt, len(prompt.ids), fields)
            self._answer_compressed(case, turn, mode, compressors, prompt, prefilled, ids)
        return text

    def _answer_compressed(
        self, case, turn, mode, compressors, prompt: Rendered, prefilled: Prefilled, answer_ids: list[int]
    ) -> None:
        rows, labels = [], []
        end = _end(prompt, mode)
        for compressor, ratios in compressors:
            plans = {}
            for ratio in ratios:
                boundary = prompt.boundary_tokens if mode == "after" else None
                plan = plan_span(
                    compressor.config, prompt_tokens=len(prompt.ids), page_size=1, boundary_tokens=boundary,
                    options={"ratio": ratio}, sliding_window_tokens=self.model.sliding_window_tokens,
                )  # fmt: skip
                if not isinstance(plan, Plan) or plan.ends_at_boundary != (mode == "after"):
                    reason = plan.value if not isinstance(plan, Plan) else "boundary"
                    fields = {"prediction": "", "problem": reason}
                    self._add(case, turn, mode, compressor.spec.label, ratio, prompt, len(prompt.ids), fields)
                else:
                    plans[ratio] = plan
            if plans:
                span = next(iter(plans.values())).span_tokens
                for row in compressor.compress(prefilled.layers, prompt.ids, list(plans.values()), answer_ids):
                    rows.append([joined(kept, raw, span, end) for kept, raw in zip(row, prefilled.layers, strict=True)])
                labels += [(compressor.spec.label, ratio) for ratio in plans]
        if not rows:
            return
        if case.metric == FIDELITY:
            found = self._read(case, turn, mode, rows, prompt, prefilled, answer_ids)
        else:
            found = self._continue(case, turn, rows, prompt, end, prefilled)
        for (label, ratio), row, fields in zip(labels, rows, found, strict=True):
            entries = row[0].key.shape[0] + len(prompt.ids) - end
            self._add(case, turn, mode, label, ratio, prompt, entries, fields)

    def _read(
        self, case, turn, mode, rows, prompt: Rendered, prefilled: Prefilled, answer_ids: list[int]
    ) -> list[dict]:
        """How each row follows the full cache's answer, and its own one where there is a reference to match."""
        stored = self.store.get(make_key(case, turn, mode, FULL, 1)) or {}
        full = Reading(*(stored[name] for name in Reading._fields))
        end = _end(prompt, mode)
        found = [reading.fields(full) for reading in read(self.model, rows, prompt.ids[end:], end, answer_ids)]
        if not case.turns[turn].answers:
            return found
        return [a | b for a, b in zip(found, self._continue(case, turn, rows, prompt, end, prefilled), strict=True)]

    def _answer_ids(self, case: Case, turn: int) -> list[int]:
        asked = case.turns[turn]
        answers = asked.answers if case.metric == "string_match_all" else asked.answers[:1]
        text = ("" if asked.answer_prefix.endswith(" ") else " ") + ", ".join(answers)
        return self.model.tokenizer(text, add_special_tokens=False)["input_ids"] if answers else []

    def _continue(self, case, turn, rows, prompt: Rendered, cut: int, prefilled: Prefilled) -> list[dict]:
        """Run what follows the first ``cut`` tokens over each row, then decode (or score a book's tokens)."""
        feed = prompt.ids[cut:]
        if case.metric == PERPLEXITY:
            return [{"logprobs": self._logprobs(row, feed, cut)} for row in rows]
        batch = Batch(self.model, rows, len(feed) + case.max_new_tokens)
        if feed:
            ids = self.model.tensor(feed).expand(len(rows), -1)
            first = batch.extend(ids, cut, last=1)[:, -1].argmax(-1).tolist()
        else:
            first = [prefilled.logits.argmax().item()] * len(rows)
        answers = generate(batch, first, len(prompt.ids), case.max_new_tokens, partial(is_settled, case, turn))
        return [{"prediction": self.model.tokenizer.decode(ids, skip_special_tokens=True)} for ids in answers]

    def _logprobs(self, row: list[LayerKV], ids: list[int], position: int) -> list[float]:
        """Log-probability of each token after the first."""
        logits = Batch(self.model, [row], len(ids)).extend(self.model.tensor([ids]), position)[0, :-1]
        return logits.log_softmax(-1).gather(1, self.model.tensor(ids[1:])[:, None])[:, 0].tolist()

    def _add(self, case, turn, mode, label, ratio, prompt: Rendered, entries: int, fields: dict) -> None:
        fields = fields | {"prompt_tokens": len(prompt.ids), "kv_tokens": entries, "runner": "hf"}
        self.store.add(make_record(case, turn, mode, label, ratio, model=Path(self.model.shape.name).name, **fields))


def _end(prompt: Rendered, mode: str) -> int:
    """What of a prompt a mode's cache holds.

    A repeat finds the first run's window in the tree, and its last token alone is computed anew.
    """
    return prompt.boundary_tokens if mode == "after" else len(prompt.ids) - (mode == "repeat")
