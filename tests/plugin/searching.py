"""What the searches for bad input share: values to try, and a repeatable search that must see enough of either kind."""

import math
import os

from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as st

REFUSED, TAKEN = 100, 10  # different inputs of either kind that each search must have seen
PHASES = (Phase.generate, Phase.shrink)
# The same examples every time, so that a change that broke nothing stays green; other ones with a seed, every night.
FUZZ_SEED = os.environ.get("METASOFT_FUZZ_SEED")
SEARCH = settings(derandomize=FUZZ_SEED is None, deadline=None, database=None, phases=PHASES)

NO_NUMBERS = [None, True, False, math.nan, math.inf, -math.inf, [], [1], {}, {"a": 1}]
EDGES = [0, 1, -1, 1.0, 0.999, 4, 63, 64, 65, 1024, 1025, 2**63 - 1, 2**63, 2**64, 10**400, -(10**400), 1e300]
WORDS = ["", "4", "nan", "true", "null", "metasoft", "snapkv", "SnapKV", "none", "attention_flow", "h2o", "tome"]
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.sampled_from(EDGES), st.sampled_from(WORDS),
    st.text(max_size=20),
)  # fmt: skip
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
edges = st.sampled_from(NO_NUMBERS) | st.sampled_from(EDGES) | st.sampled_from(WORDS)


def search(inputs, attempt, examples=800):
    """Call ``attempt``, which returns the words of a refusal or None, with many of the inputs."""
    refused, taken = set(), set()

    @settings(SEARCH, max_examples=examples)
    @given(inputs)
    def run(value):
        words = attempt(value)
        (taken if words is None else refused).add(repr(value))
        assert words is None or ("\n" not in words and len(words) < 2000)

    (seed(int(FUZZ_SEED))(run) if FUZZ_SEED is not None else run)()
    counts = len(refused), len(taken)
    assert counts[0] >= REFUSED and counts[1] >= TAKEN
