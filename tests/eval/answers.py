"""Answers of two runners, side by side."""

from sglang_metasoft.eval.metrics import PERPLEXITY

LOGPROB_TOLERANCE = 5e-3


def by_key(records: list[dict]) -> dict[tuple, dict]:
    return {tuple(record[name] for name in ("task", "index", "turn", "mode", "method")): record for record in records}


def assert_same_answers(served: dict[tuple, dict], in_process: dict[tuple, dict]) -> None:
    """The same prompts, entries and texts; kernels differ, so that answers may part at a near tie, but rarely."""
    assert served.keys() == in_process.keys()
    different = []
    for key, record in served.items():
        other = in_process[key]
        assert record["prompt_tokens"] == other["prompt_tokens"]
        if record["metric"] == PERPLEXITY:
            assert record["scored_tokens"] == other["scored_tokens"] > 100, key
            assert abs(record["score"] - other["score"]) < LOGPROB_TOLERANCE, key
            continue
        if record["ratio"] != 1:
            assert record["metasoft_kv_tokens"] == other["kv_tokens"], key
        shown = other["prediction"].strip()
        # In process an answer ends as soon as nothing more could change its score.
        if not record["prediction"].strip().startswith(shown):
            different.append((*key, record["prediction"][:40], shown[:40]))
    assert len(different) <= len(served) // 20, different
