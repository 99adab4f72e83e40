"""Methods as the command line names them."""

import pytest

from sglang_metasoft.eval.hf import MethodSpec


@pytest.mark.parametrize(
    ("text", "name", "consolidation", "path", "settings"),
    [
        ("snapkv", "snapkv", None, None, {}),
        ("metasoft+none@runs/a:b", "metasoft", "none", "runs/a:b", {}),
        ("metasoft:route_band=64,gate_scale=0.5@x", "metasoft", None, "x", {"route_band": 64, "gate_scale": 0.5}),
        ("oracle+zeromerge:sink=0", "oracle", "zeromerge", None, {"sink": 0}),
    ],
)
def test_a_method_with_its_settings(text, name, consolidation, path, settings):
    assert MethodSpec.parse(text) == MethodSpec(text, name, consolidation, path, settings)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("metasoft:rout_band=3", "rout_band.*route_band"),
        ("metasoft:route_band=0", "0 is not allowed.*>= 1"),
        ("metasoft:route_band", "not JSON"),
    ],
)
def test_a_bad_setting_is_named(text, words):
    with pytest.raises(ValueError, match=words):
        MethodSpec.parse(text)
