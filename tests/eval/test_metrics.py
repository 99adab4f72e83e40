"""Metrics against known values."""

import pytest

from sglang_metasoft.eval.metrics import METRICS, score


@pytest.mark.parametrize(
    ("metric", "prediction", "answers", "expected"),
    [
        ("string_match_all", "It is 12 and 34.", ["12", "56"], 0.5),
        ("string_match_all", "ABC def", ["abc", "DEF"], 1.0),
        ("string_match_part", "the Normans came", ["france", "normans"], 1.0),
        ("string_match_part", "", ["france"], 0.0),
        ("qa_f1", "The cat sat.", ["a cat sat down"], 0.8),  # 2 of 2 and 2 of 3 words
        ("qa_f1", "nothing", ["a cat", "nothing at all"], 0.5),
        ("rouge_l", "the cat sat on the mat", ["the cat lay on the mat"], 0.8),
        ("rouge_l", "...", ["the cat"], 0.0),
        ("retrieval", "Paragraph 3 or 4", ["Paragraph 3"], 0.5),
        ("retrieval", "Paragraph 3", ["Paragraph 3"], 1.0),
        ("count", "There are 12", ["12"], 1.0),
        ("count", "none", ["12"], 0.0),
        ("code_similarity", "\n# a comment\nreturn x + 1", ["return x + 1"], 1.0),
        ("code_similarity", "return x - 1", ["return x + 1"], 0.92),
    ],
)
def test_known_values(metric, prediction, answers, expected):
    assert score(metric, prediction, answers, {}) == pytest.approx(expected, abs=1e-4)


def test_classification_divides_by_the_classes_named():
    details = {"classes": ["Date", "City", "Other location", "Location"]}
    assert METRICS["classification"]("Date", ["Date"], details) == 1
    assert METRICS["classification"]("City or Date", ["Date"], details) == 0.5
    assert METRICS["classification"]("Other location", ["Other location"], details) == 1
    assert METRICS["classification"]("unknown", ["Date"], details) == 0
