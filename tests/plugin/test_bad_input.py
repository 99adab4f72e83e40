"""Bad input, found by hypothesis: whatever a client, a command line or a keyword holds, it is either
taken as it is meant or refused with a ValueError that names the culprit and what is allowed.

``VALID`` says anew, apart from the product's own table, which values a setting may have.
"""

import contextlib
import functools
import io
import json
import math
import operator

import pytest
import sglang.srt.plugins as plugins
from hypothesis import strategies as st

from sglang_metasoft.config import read_config_json
from sglang_metasoft.request_options import RequestOptions
from tests.plugin.searching import EDGES, WORDS, edges, scalars, search, values

plugins.load_plugins()

from sglang.srt.entrypoints.engine import Engine  # noqa: E402
from sglang.srt.server_args import prepare_server_args  # noqa: E402


def is_int(value, low, high=math.inf):
    return type(value) is int and low <= value <= high


def is_name(value):
    return type(value) is str and value != ""


KNOWN_METHODS = [
    "auto", "metasoft", "judge_q", "snapkv", "h2o", "streaming_llm", "chunkkv", "q_filters", "kvcompose", "nestedkv",
    "expected_attention", "keydiff", "snapkv_keydiff", "random",
]  # fmt: skip
KNOWN_CONSOLIDATIONS = ["none", "attention_flow", "key_bias", "zeromerge", "tome", "least_squares"]

VALID = {
    "ratio": lambda value: type(value) in (int, float) and 1 <= value < 2**63,
    "budget": lambda value: value is None or is_int(value, 1, 2**63 - 1),
    "min_tokens": lambda value: is_int(value, 1),
    "window": lambda value: is_int(value, 1),
    "sink": lambda value: is_int(value, 0),
    "method": lambda value: value in KNOWN_METHODS,
    "path": lambda value: value is None or is_name(value),
    "keep_raw": lambda value: type(value) is bool,
    "during_prefill": lambda value: type(value) is bool,
    "consolidation": lambda value: value in (None, *KNOWN_CONSOLIDATIONS),
    "soft_tokens": lambda value: is_int(value, 1, 1024),
    "route_targets": lambda value: is_int(value, 1, 64),
    "route_band": lambda value: is_int(value, 1),
    "reread_tokens": lambda value: is_int(value, 0, 65536),
    "gate_scale": lambda value: value is None or (type(value) in (int, float) and 0 <= value <= 1),
    "pool_kernel": lambda value: is_int(value, 1, 63) and value % 2 == 1,
    "observed_tokens": lambda value: is_int(value, 1, 65536),
    "index_tokens": lambda value: is_int(value, 1),
    "trace_dir": lambda value: value is None or is_name(value),
}

SOUND = {
    "ratio": 2.5, "budget": 300, "min_tokens": 1, "window": 8, "sink": 0, "method": "snapkv", "path": "somewhere",
    "keep_raw": False, "during_prefill": True, "consolidation": "none", "soft_tokens": 1024, "route_targets": 64,
    "route_band": 2**70, "reread_tokens": 0, "gate_scale": 0.5, "pool_kernel": 63, "observed_tokens": 65536,
    "index_tokens": 2**70, "trace_dir": "/tmp",
}  # fmt: skip

# -- what to try -----------------------------------------------------------------------------------------------------

names = st.sampled_from(sorted(VALID))
wrong_names = st.sampled_from(["ration", "Ratio", "secret", "config", " ratio", "", "enable"]) | st.text(max_size=10)
sound_objects = st.sets(names, max_size=4).map(lambda some: {name: SOUND[name] for name in some})
bad_objects = st.dictionaries(names | wrong_names, values, max_size=3) | st.dictionaries(names, edges, max_size=2)
objects = st.one_of(sound_objects, bad_objects, st.builds(operator.or_, sound_objects, bad_objects))


def nested(depth):
    value = 1
    for _ in range(depth):
        value = [value]
    return value


UNPRINTABLE = [pytest.param(10**5000, id="digits"), pytest.param(nested(100_000), id="nesting")]


def head_of(words):
    """What is wrong, without the list of what is allowed."""
    head, divider, allowed = words.partition("; allowed: ")
    assert divider and allowed
    return head


# -- per-request fields ----------------------------------------------------------------------------------------------

FIELDS = {
    "metasoft_ratio": VALID["ratio"],
    "metasoft_budget": lambda value: is_int(value, 1, 2**63 - 1),
    "metasoft_boundary": lambda value: is_int(value, 1, 2**63 - 1),
}
fields = st.sampled_from(sorted(FIELDS))
near_values = st.one_of(edges, values, st.integers(-1, 2**64), st.floats(0.5, 1e19))
request_keys = st.one_of(
    fields,
    st.one_of(names, wrong_names, st.just("boundaries")).map("metasoft_{}".format),
    st.sampled_from(["METASOFT_RATIO", "ratio", "thinking_budget"]) | st.integers() | st.none() | st.floats(),
)
custom_params = st.one_of(
    values,
    st.dictionaries(request_keys, values, max_size=4),
    st.dictionaries(fields, near_values, min_size=1, max_size=1),
    st.dictionaries(fields, near_values, min_size=1),
)


def test_request_fields_are_taken_or_refused():
    search(custom_params, check_request_fields)


def check_request_fields(params):
    ours = {}
    if isinstance(params, dict):
        ours = {key: value for key, value in params.items() if isinstance(key, str) and key.startswith("metasoft_")}
    try:
        options = RequestOptions.parse(params)
    except ValueError as error:
        head = head_of(str(error))
        assert head.startswith("custom_params: ")
        if isinstance(params, dict):
            assert any(repr(key)[1:-1] in head for key in ours) and not are_fields(ours)
        else:
            assert params is not None and repr(params)[:100] in head
        return str(error)
    assert (params is None or isinstance(params, dict)) and are_fields(ours)
    assert options == {key.removeprefix("metasoft_"): value for key, value in ours.items()}


def are_fields(ours):
    if {"metasoft_ratio", "metasoft_budget"} <= set(ours):
        return False
    return all(key in FIELDS and FIELDS[key](value) for key, value in ours.items())


@pytest.mark.parametrize("value", UNPRINTABLE)
@pytest.mark.parametrize("field", sorted(FIELDS))
def test_a_request_field_that_cannot_be_printed_is_refused(field, value):
    with pytest.raises(ValueError, match=f"custom_params: {field}=<(int|list)> is not allowed; allowed: "):
        RequestOptions.parse({field: value})


# -- --metasoft-config -----------------------------------------------------------------------------------------------

config_texts = st.one_of(
    objects.map(json.dumps),
    values.map(json.dumps),
    st.text(max_size=30),
    st.builds(lambda value, end: json.dumps(value)[:end], objects, st.integers(0, 30)),
    st.builds("{}{}".format, objects.map(json.dumps), st.sampled_from(["}", ",", " 1", "\n{}"])),
)


def test_a_json_configuration_is_taken_or_refused():
    search(config_texts, check_config_text)


def check_config_text(text):
    try:
        config = read_config_json(text)
    except ValueError as error:
        head = head_of(str(error))
        try:
            given = json.loads(text)
        except ValueError:
            assert head.startswith(f"--metasoft-config: {repr(text)[:100]}") and "is not JSON (" in head
        else:
            assert not is_config(given)
            if isinstance(given, dict):
                assert any(repr(key) in head or f"metasoft {key}: " in head for key in given)
            else:
                assert head == f"--metasoft-config must be a JSON object, got {given!r}" or len(repr(given)) > 200
        return str(error)
    assert config == json.loads(text) and is_config(config)


def is_config(config):
    return isinstance(config, dict) and all(key in VALID and VALID[key](value) for key, value in config.items())


@pytest.mark.parametrize(
    "text", ["[" * 200_000, '{"ratio": ' * 100_000, '{"budget": ' + "9" * 5000 + "}"], ids=["[", "{", "digits"]
)
def test_json_that_python_cannot_hold_is_refused(text):
    with pytest.raises(ValueError, match=r"--metasoft-config: .* is not JSON .*; allowed: ") as error:
        read_config_json(text)
    assert len(str(error.value)) < 2000


# -- command line ----------------------------------------------------------------------------------------------------

VALUE_FLAGS = ("ratio", "budget", "min_tokens", "window", "sink", "method", "path")
SWITCHES = ("--metasoft-keep-raw", "--no-metasoft-keep-raw", "--metasoft-during-prefill")


def flag_of(name):
    return f"--metasoft-{name.replace('_', '-')}"


def flag_value(name, text):
    return {"ratio": float, "method": str, "path": str}.get(name, int)(text)


flag_texts = st.one_of(
    st.sampled_from([str(value) for value in EDGES if abs(value) < 10**20] + WORDS),
    st.sampled_from(["1_0", " 8 ", "inf", "0x10", "1e3", "4.0", "9" * 5000, "metasoft ", "\n", "\0"]),
    st.sampled_from([str(value) for value in SOUND.values()]), st.floats().map(str), st.integers().map(str),
    st.text(max_size=20),
)  # fmt: skip
pieces = st.one_of(
    st.tuples(st.sampled_from(VALUE_FLAGS), flag_texts),
    st.tuples(st.just("config"), config_texts),
    st.tuples(st.sampled_from(SWITCHES), st.none() | st.sampled_from(["", "true", "0", "maybe"])),
    st.tuples(st.sampled_from([flag_of(name) for name in VALUE_FLAGS]), st.none()),
    st.tuples(st.sampled_from(["--metasoft", "--metasoft-ration", "--metasoft-m", "--enable-metasof"]), st.just("4")),
)
repeats = st.sampled_from(VALUE_FLAGS).map(lambda name: [(name, str(SOUND[name])), ("config", json.dumps(SOUND))])
lines = st.tuples(st.booleans() | st.just(True), st.lists(pieces, min_size=1, max_size=3) | repeats)


def arguments_of(line):
    enabled, parts = line
    arguments = ["--enable-metasoft"] if enabled else []
    for name, text in parts:
        flag = name if name.startswith("--") else flag_of(name)
        arguments.append(flag if text is None else f"{flag}={text}")
    return arguments


def is_piece(name, text):
    try:
        if name == "config":
            return is_config(json.loads(text))
        return name in SWITCHES and text is None or name in VALUE_FLAGS and VALID[name](flag_value(name, text))
    except ValueError:
        return False


def test_a_command_line_is_taken_or_refused(model_dir):
    search(lines, functools.partial(check_command_line, model_dir), examples=400)


def check_command_line(model_dir, line):
    enabled, parts = line
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            record = prepare_server_args(["--model-path", str(model_dir), *arguments_of(line)])
    except SystemExit as stop:
        assert stop.code == 2
        return check_usage_error(parts, printed.getvalue())
    except ValueError as error:
        words = str(error)
        assert words.endswith("in --metasoft-config" if enabled else "given without --enable-metasoft")
        assert all(is_piece(*part) for part in parts) and not fits_together(enabled, dict(parts))
        return words
    assert all(is_piece(*part) for part in parts) and fits_together(enabled, dict(parts))
    check_configuration(record._metasoft)
    for name, text in dict(parts).items():
        if name in VALUE_FLAGS:
            assert getattr(record._metasoft, name) == flag_value(name, text)


def fits_together(enabled, parts):
    """Whether no setting is given twice, or without the switch that turns MetaSoft on."""
    config = json.loads(parts.pop("config", "{}"))
    flags = {name.removeprefix("--no-").removeprefix("--") for name in parts}
    flags = {name.removeprefix("metasoft-").replace("-", "_") for name in flags}
    return not flags & set(config) if enabled else not flags | set(config)


def check_usage_error(parts, printed):
    """argparse prints the usage, then one line that names a bad argument."""
    words = printed[printed.rindex("sglang serve: error: ") :].removesuffix("\n")
    assert any(is_named(words, *part) for part in parts if not is_piece(*part))
    return words


def is_named(words, name, text):
    if name.startswith("--"):  # argparse's own words
        return name in words
    heads = ["--metasoft-config", "metasoft "]
    if name != "config":
        heads = [f"metasoft {name}: {repr(text)[:100]}"]
        with contextlib.suppress(ValueError):
            heads.append(f"metasoft {name}: {flag_value(name, text)!r} ")
    starts = tuple(f"sglang serve: error: argument {flag_of(name)}: {head}" for head in heads)
    return words.startswith(starts) and "; allowed: " in words


def check_configuration(config):
    assert config is None or all(is_valid(getattr(config, name)) for name, is_valid in VALID.items())


# -- keywords of sgl.Engine ------------------------------------------------------------------------------------------

switches = st.fixed_dictionaries(
    {"enable_metasoft": st.just(True) | st.booleans() | scalars},
    optional={"metasoft_config": st.one_of(st.none(), objects, config_texts, values)},
)
keywords = st.builds(
    lambda switches, others: switches | {f"metasoft_{name}": value for name, value in others.items()},
    switches, objects,
)  # fmt: skip


def test_engine_keywords_are_taken_or_refused(model_dir):
    search(keywords, functools.partial(check_keywords, model_dir))


def check_keywords(model_dir, keywords):
    given = {key.removeprefix("metasoft_"): value for key, value in keywords.items()}
    enabled, config = given.pop("enable_metasoft"), given.pop("config", None)
    if isinstance(config, str):
        is_sound = is_piece("config", config)
    else:
        is_sound = config is None or is_config(config)
    is_sound = is_sound and type(enabled) is bool and is_config(given)
    try:
        record = Engine.server_args_class(model_path=str(model_dir), **keywords)
    except ValueError as error:
        words = str(error)
        if not words.endswith(("given without --enable-metasoft", "given both as a flag and in --metasoft-config")):
            assert not is_sound and "metasoft" in head_of(words)
        return words
    assert is_sound
    check_configuration(record._metasoft)
    assert all(getattr(record._metasoft, name) == value for name, value in given.items())
