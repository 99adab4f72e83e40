"""Settings: defaults, ranges, JSON, per-request fields."""

import pytest

from sglang_metasoft.config import MetaSoftConfig, read_config_json, settings_of
from sglang_metasoft.request_options import RequestOptions


def test_defaults_are_those_of_the_documentation():
    config = MetaSoftConfig()
    assert (config.ratio, config.budget, config.min_tokens) == (4.0, None, 512)
    assert (config.window, config.sink, config.method, config.path) == (64, 4, "auto", None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ratio", 0.5),
        ("ratio", float("nan")),
        ("ratio", float("inf")),
        ("ratio", True),
        ("ratio", "4"),
        ("budget", 0),
        ("budget", 2.5),
        ("min_tokens", 0),
        ("window", 0),
        ("window", -1),
        ("sink", -1),
        ("method", "magic"),
        ("method", None),
        ("path", ""),
        ("keep_raw", 1),
        ("consolidation", "soup"),
        ("soft_tokens", 0),
        ("soft_tokens", 4096),
        ("route_targets", 0),
        ("route_band", 0),
        ("reread_tokens", -1),
        ("reread_tokens", 65537),
        ("gate_scale", 1.5),
        ("gate_scale", float("nan")),
        ("gate_scale", True),
        ("pool_kernel", 4),
    ],
)
def test_a_bad_value_is_named_with_the_allowed_ones(name, value):
    with pytest.raises(ValueError, match=name) as error:
        MetaSoftConfig(**{name: value})
    assert repr(value) in str(error.value)
    assert settings_of()[name].metadata["allowed"] in str(error.value)


def test_the_secret_differs_between_servers_and_is_never_printed():
    first, second = MetaSoftConfig(), MetaSoftConfig()
    assert first.secret != second.secret
    assert first.secret not in repr(first) + first.describe()


def test_json_takes_the_same_keys():
    assert read_config_json('{"ratio": 8, "route_targets": 2}') == {"ratio": 8, "route_targets": 2}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("[1]", "must be a JSON object"),
        ('{"ration": 4}', "unknown key 'ration'"),
        ('{"ratio": 0}', "ratio: 0 is not allowed"),
        ('{"secret": "00"}', "unknown key 'secret'"),
    ],
)
def test_bad_json_is_refused_in_words(text, words):
    with pytest.raises(ValueError, match=words.replace("[", r"\[")):
        read_config_json(text)


def test_request_fields_override_ratio_or_budget():
    assert RequestOptions.parse(None) == {}
    assert RequestOptions.parse({"thinking_budget": 5}) == {}
    assert RequestOptions.parse({"metasoft_ratio": 8}) == {"ratio": 8}
    assert RequestOptions.parse({"metasoft_budget": 256}) == {"budget": 256}


@pytest.mark.parametrize(
    "params",
    [
        {"metasoft_ratio": 0.99},
        {"metasoft_ratio": "4"},
        {"metasoft_ratio": None},
        {"metasoft_ratio": [4]},
        {"metasoft_budget": 0},
        {"metasoft_budget": 1.5},
        {"metasoft_window": 3},
        {"metasoft_ratio": 4, "metasoft_budget": 256},
    ],
)
def test_bad_request_fields_are_refused(params):
    with pytest.raises(ValueError, match="custom_params"):
        RequestOptions.parse(params)
