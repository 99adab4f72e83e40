"""Drives a server through all cases: concurrent over cases, one after the other within one."""

from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from sglang_metasoft.eval.case import MODES, Case, Rendered, answered, render
from sglang_metasoft.eval.client import OTHER_TEXT, Answer, Server, answer_in_full, follow, measure, new_run_id
from sglang_metasoft.eval.fidelity import Reading
from sglang_metasoft.eval.metrics import FIDELITY, PERPLEXITY
from sglang_metasoft.eval.records import FULL, Store, make_key, make_record

REPORTED = (
    "metasoft_span_tokens",
    "metasoft_kv_tokens",
    "metasoft_reused_tokens",
    "metasoft_bypass",
    "cached_tokens",
)


class Run:
    """One evaluation of one server.

    Args:
        label: the method's name in records and plots.
        ratios: 1 is the full cache; each is asked in this object's own order.
        modes: of :data:`sglang_metasoft.eval.case.MODES`.
        concurrency: cases asked at the same time.
    """

    def __init__(self, server: Server, tokenizer, store: Store, *, label: str, ratios: list[float], modes: list[str]):
        self.server, self.tokenizer, self.store = server, tokenizer, store
        self.label, self.modes = label, modes
        self.ratios = sorted(ratios, reverse=True)  # the full cache last: its raw window would be in the way
        self.run_id = new_run_id()
        self.other_ids = tokenizer(OTHER_TEXT, add_special_tokens=False)["input_ids"]

    def run(self, cases: list[Case], concurrency: int = 1) -> None:
        """Ask what the store lacks.

        Raises:
            ValueError: the server does not answer, or refuses a request; what was answered before stays.
        """
        total = sum(len(self._wanted(case, turn)) for case in cases for turn in range(len(case.turns)))
        with tqdm(total=total, unit="answer", desc=self.label) as bar, ThreadPoolExecutor(concurrency) as pool:
            futures = [pool.submit(self._answer, case, bar) for case in cases]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _wanted(self, case: Case, turn: int) -> list[tuple[str, float]]:
        modes = [mode for mode in self.modes if mode == "after" or not (turn or case.metric == PERPLEXITY)]
        pairs = [(mode, ratio) for mode in modes for ratio in self.ratios]
        return [pair for pair in pairs if self._key(case, turn, *pair) not in self.store]

    def _key(self, case: Case, turn: int, mode: str, ratio: float) -> tuple:
        return make_key(case, turn, mode, FULL if ratio == 1 else self.label, ratio)

    def _answer(self, case: Case, bar: tqdm) -> None:
        for turn in range(len(case.turns)):
            wanted = self._wanted(case, turn)
            if case.metric == FIDELITY:
                case = self._follow(case, turn, wanted, bar)
                continue
            if not wanted:
                continue
            prompt = render(case, turn, self.tokenizer)
            full = None  # the same in every mode
            for mode, ratio in wanted:
                found = (
                    full
                    if ratio == 1 and full
                    else measure(self.server, case, turn, mode, ratio, prompt, self.other_ids, self.run_id)
                )
                full = found if ratio == 1 else full
                fields = {"logprobs": found.answer.logprobs} if case.metric == PERPLEXITY else {}
                reported = _reported(found.answer.meta)
                record = make_record(
                    case, turn, mode, FULL if ratio == 1 else self.label, ratio,
                    prediction=found.answer.text, problem=found.problem, seconds=round(found.seconds, 3),
                    prompt_tokens=len(prompt.ids), runner=self.server.api, model=self.server.model,
                    **reported, **fields,
                )  # fmt: skip
                self.store.add(record)
                bar.update()

    def _follow(self, case: Case, turn: int, wanted: list[tuple[str, float]], bar: tqdm) -> Case:
        """Let caches of all ratios read the full cache's answer; the case with that answer, for later turns."""
        stored = [self.store.get(self._key(case, turn, mode, 1)) for mode in MODES]
        known = next(filter(None, stored), None)
        if not wanted:
            return answered(case, turn, known["prediction"]) if known else case
        prompt = render(case, turn, self.tokenizer)
        if known:
            full = Answer(known["prediction"], {}, [], tuple(known["answer_ids"]))
        else:
            full = answer_in_full(self.server, case, turn, prompt, self.run_id)
        for mode in dict.fromkeys(mode for mode, _ in wanted):
            # The rise is over what the full cache says of its own answer when it reads it again, asked for or not.
            ratios = [ratio for name, ratio in wanted if name == mode]
            if self.store.get(self._key(case, turn, mode, 1)) is None:
                self._read(case, turn, mode, 1.0, prompt, full, None)
            record = self.store.get(self._key(case, turn, mode, 1)) or {}
            over = Reading(*(record[name] for name in Reading._fields))
            for ratio in ratios:
                if ratio != 1:
                    self._read(case, turn, mode, ratio, prompt, full, over)
                bar.update()
        return answered(case, turn, full.text)

    def _read(
        self, case: Case, turn: int, mode: str, ratio: float, prompt: Rendered, full: Answer, over: Reading | None
    ) -> None:
        found = follow(self.server, case, turn, mode, ratio, prompt, list(full.ids), self.other_ids, self.run_id)
        own = full if ratio == 1 else found.own
        text = {} if own is None else {"prediction": own.text}
        ids = {"answer_ids": list(full.ids)} if ratio == 1 else {}
        record = make_record(
            case, turn, mode, FULL if ratio == 1 else self.label, ratio,
            problem=found.problem, seconds=round(found.seconds, 3), prompt_tokens=len(prompt.ids),
            runner=self.server.api, model=self.server.model,
            **text, **ids, **_reported(found.meta), **found.reading.fields(over),
        )  # fmt: skip
        self.store.add(record)


def _reported(meta: dict) -> dict:
    return {name: meta[name] for name in REPORTED if name in meta}
