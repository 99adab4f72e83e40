"""Scores of one answer, from 0 to 1, as the benchmarks define them.

RULER (arXiv 2404.06654): ``string_match_all``, ``string_match_part``. LongBench (arXiv 2308.14508): ``qa_f1``,
``rouge_l``, ``classification``, ``retrieval``, ``count``, ``code_similarity``.
"""

import difflib
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

ARTICLES = re.compile(r"\b(a|an|the)\b")
NUMBER = re.compile(r"\d+")


def string_match_all(prediction: str, answers: Sequence[str], details: dict) -> float:
    """Share of the answers that occur in the prediction, case aside."""
    return sum(answer.lower() in prediction.lower() for answer in answers) / len(answers)


def string_match_part(prediction: str, answers: Sequence[str], details: dict) -> float:
    """1 if any answer occurs in the prediction, case aside."""
    return float(any(answer.lower() in prediction.lower() for answer in answers))


def _normalized_words(text: str) -> list[str]:
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return ARTICLES.sub(" ", text).split()


def exact_match(prediction: str, answers: Sequence[str]) -> bool:
    """Whether the prediction is one of the answers, case, punctuation, articles and white space aside."""
    return any(_normalized_words(prediction) == _normalized_words(answer) for answer in answers)


def qa_f1(prediction: str, answers: Sequence[str], details: dict) -> float:
    """Best F1 of normalized words over the answers."""

    def one(answer: str) -> float:
        found, wanted = _normalized_words(prediction), _normalized_words(answer)
        same = (Counter(found) & Counter(wanted)).total()
        return 2 * same / (len(found) + len(wanted)) if same else 0.0

    return max(map(one, answers))


def rouge_l(prediction: str, answers: Sequence[str], details: dict) -> float:
    """Best ROUGE-L F over the answers (package ``rouge``, as LongBench)."""
    from rouge import Rouge

    if not any(character.isalnum() for character in prediction):
        return 0.0
    scorer = Rouge(metrics=["rouge-l"])
    return max(scorer.get_scores([prediction], [answer])[0]["rouge-l"]["f"] for answer in answers)


def classification(prediction: str, answers: Sequence[str], details: dict) -> float:
    """1 over the number of class names in the prediction, if the right one is among them.

    Names that are part of the right one do not count. ``details["classes"]`` lists all names.
    """
    (answer,) = answers
    found = [name for name in details["classes"] if name in prediction]
    found = [name for name in found if name == answer or name not in answer]
    return 1 / len(found) if answer in found else 0.0


def _share_of_numbers(prediction: str, wanted: str) -> float:
    numbers = NUMBER.findall(prediction)
    return numbers.count(wanted) / len(numbers) if numbers else 0.0


def retrieval(prediction: str, answers: Sequence[str], details: dict) -> float:
    """Share of the numbers in the prediction that name the right paragraph (``Paragraph 7``)."""
    return _share_of_numbers(prediction, NUMBER.findall(answers[0])[0])


def count(prediction: str, answers: Sequence[str], details: dict) -> float:
    """Share of the numbers in the prediction that are the right one."""
    return _share_of_numbers(prediction, answers[0])


def code_similarity(prediction: str, answers: Sequence[str], details: dict) -> float:
    """Edit similarity of the first code line, rounded to hundredths as fuzzywuzzy does."""
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return max(round(difflib.SequenceMatcher(None, line, answer).ratio(), 2) for answer in answers)


METRICS: dict[str, Callable[[str, Sequence[str], dict], float]] = {
    function.__name__: function
    for function in (
        string_match_all, string_match_part, qa_f1, rouge_l, classification, retrieval, count, code_similarity,
    )
}  # fmt: skip
MONOTONE = {"string_match_all", "string_match_part"}  # more text never lowers these
PERPLEXITY = "perplexity"  # scored by log-probabilities, not by an answer
FIDELITY = "fidelity"  # scored by the full cache's own answer: sglang_metasoft.eval.fidelity


def score(metric: str, prediction: str, answers: Sequence[str], details: dict) -> float:
    """Score of a prediction by the metric's name."""
    return METRICS[metric](prediction, answers, details)
