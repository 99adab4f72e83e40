"""Prompts, and the fields that SGLang's endpoints share, as strategies."""

from hypothesis import strategies as st

from tests.differential.servers import ADAPTER, MIN_TOKENS, SESSIONS, WINDOW

yes = st.just(True)
PAGE, CHUNK, VOCABULARY, DOCUMENT_TOKENS = 16, 256, 49152, 4900
SPAN = MIN_TOKENS + WINDOW
EDGES = sorted(
    edge + by
    for edge in (2, WINDOW, MIN_TOKENS, SPAN, SPAN + PAGE, CHUNK, CHUNK + WINDOW, CHUNK + SPAN, 2 * CHUNK)
    for by in (-1, 0, 1)
)
MODEL = "m"
models = st.sampled_from([MODEL] * 7 + [f"{MODEL}:{ADAPTER}"])


@st.composite
def some(draw, options: dict, most: int = 3) -> dict:
    """A few of the fields."""
    names = draw(st.lists(st.sampled_from(list(options)), max_size=most, unique=True))
    return {name: draw(options[name]) for name in names}


def mostly(good, rare, one_in: int = 16):
    """The second strategy now and then."""
    return st.integers(0, one_in - 1).flatmap(lambda n: rare if n == one_in - 1 else good)


# -- prompts -------------------------------------------------------------------------------------------------------

long_lengths = mostly(st.sampled_from(EDGES) | st.integers(MIN_TOKENS, 400), st.integers(400, 2500), 12)
documents = st.tuples(st.sampled_from([0, 800]), st.sampled_from([200, 130, 300, 96, 520])).map(list)
questions = st.tuples(st.integers(0, 9).map(lambda n: 3000 + 100 * n), st.integers(1, 100)).map(list)
lone = st.tuples(st.sampled_from([0, 800, 1601, 2000]), mostly(long_lengths, st.integers(1, 40), 4)).map(list)
slices = mostly(
    st.lists(questions, min_size=1, max_size=2).flatmap(lambda asked: documents.map(lambda part: [part, *asked])),
    lone.map(lambda part: [part]),
    3,
)
earlier = st.none() | st.integers(0, 5)


def with_earlier(kind: str, parts) -> st.SearchStrategy:
    return st.tuples(parts, earlier).map(
        lambda pair: {kind: pair[0]} if pair[1] is None else {kind: pair[0], "after": pair[1]}
    )


ids = mostly(with_earlier("ids", slices), st.sampled_from([[5], [1, 2], [VOCABULARY - 1, 7]]), 20)
texts = slices.map(lambda parts: {"text": parts})
turns = st.tuples(st.sampled_from(["user", "system", "assistant"]), slices).map(list)
messages = with_earlier(
    "messages",
    st.one_of(slices.map(lambda parts: [["user", parts]]), st.lists(turns, min_size=1, max_size=3)),
)

# -- fields --------------------------------------------------------------------------------------------------------

schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
NAMED_SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
CHOICES = ["none", "auto", "required"]
SCHEMA_TEXT = '{"type":"object","properties":{"a":{"type":"integer"}},"required":["a"]}'
lengths = mostly(st.integers(1, 8), st.sampled_from([0, 1, 30]), 6)
counted = mostly(st.integers(1, 8), st.sampled_from([1, 30]), 6)  # to a chat, 0 means no limit
stops = st.sampled_from([" the", [" a", " of"], ",", "\n", ["zzz"]])
penalty = st.sampled_from([0.5, -0.5, 2.0, 0.0])
some_ids = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=3)
GRAMMARS = {
    "json_schema": st.just(SCHEMA_TEXT),
    "regex": st.sampled_from(["[a-c]{2,4}", "(yes|no)", "\\d+"]),
    "ebnf": st.just('root ::= "yes" | "no" [a-z]*'),
}
SHARED_SAMPLING = {  # under one name in all of SGLang's own endpoints
    "stop": stops, "stop_token_ids": st.lists(st.integers(0, 400), max_size=4), "ignore_eos": yes,
    "stop_regex": st.sampled_from(["a.", "[,.]"]), "no_stop_trim": st.booleans(), "skip_special_tokens": st.booleans(),
    "frequency_penalty": penalty, "presence_penalty": penalty, "repetition_penalty": st.sampled_from([1.2, 0.8]),
    "logit_bias": st.sampled_from([{"28": -5.0}, {"28": 3, "260": -1}]), "top_k": st.sampled_from([1, 5, -1]),
    "top_p": st.sampled_from([0.5, 1.0]), "min_p": st.sampled_from([0.0, 0.2]), "n": st.integers(1, 3), **GRAMMARS,
}  # fmt: skip
SAMPLING = SHARED_SAMPLING | {
    "temperature": st.sampled_from([0, 0.7, 1.5]), "min_new_tokens": st.integers(0, 4), "beam_width": st.integers(1, 3),
    "spaces_between_special_tokens": st.booleans(), "sampling_seed": st.integers(0, 9),
    "stream_interval": st.integers(1, 4),
}  # fmt: skip
ROUTING = {  # what says whose request it is; none of it changes an answer
    "cache_salt": st.sampled_from(["a", "b"]), "extra_key": st.sampled_from(["a", "b"]),
    "priority": st.sampled_from([0, 1, -1, 100]), "session_id": st.sampled_from(["agent-1", "agent-2"]),
    "rid": st.sampled_from(["r0", "r1"]), "bootstrap_host": st.just("2.2.2.2"), "routed_dp_rank": st.just(0),
}  # fmt: skip
OPENED = {"session_params": st.sampled_from(SESSIONS).map(lambda name: {"id": name})}
custom_params = st.one_of(
    st.fixed_dictionaries({"metasoft_boundary": st.sampled_from([96, 130, 200, 300, 64, 1])}),
    st.fixed_dictionaries({"metasoft_ratio": st.sampled_from([1, 2, 8, 1000])}),
    st.fixed_dictionaries({"metasoft_budget": st.sampled_from([1, 50, 100, 4000])}),
    st.fixed_dictionaries({"metasoft_budget": st.just(60), "metasoft_boundary": st.just(200)}),
    st.just({"mine": 1}),
)
ODD = st.sampled_from([None, -1, 0, 2**31, 1.5, "x", [], {}, True])  # where a number or an object is expected


def oddly(fields: dict, names: list[str]) -> dict:
    """Let some fields, by name, now and then have a value of another kind."""
    return fields | {name: mostly(fields[name], ODD, 8) for name in names if name in fields}
