"""Drives a server through all cases: concurrent over cases, one after the other within one."""

from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from sglang_metasoft.eval.case import Case, render
from sglang_metasoft.eval.client import OTHER_TEXT, Server, measure, new_run_id
from sglang_metasoft.eval.metrics import PERPLEXITY
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
                meta = found.answer.meta
                reported = {name: meta[name] for name in REPORTED if name in meta}
                record = make_record(
                    case, turn, mode, FULL if ratio == 1 else self.label, ratio,
                    prediction=found.answer.text, problem=found.problem, seconds=round(found.seconds, 3),
                    prompt_tokens=len(prompt.ids), runner=self.server.api, model=self.server.model,
                    **reported, **fields,
                )  # fmt: skip
                self.store.add(record)
                bar.update()
