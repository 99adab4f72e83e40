"""``--metasoft-fit`` on a real server: it fits what is missing, serves it, and the next start finds it at once."""

import json
from pathlib import Path

import pytest

pytestmark = [pytest.mark.server, pytest.mark.slow]  # two minutes of training

FLAGS = ("--enable-metasoft", "--metasoft-fit", "--metasoft-config", json.dumps({"fit_minutes": 2}))


def test_a_start_fits_and_the_next_one_finds(start_server, document, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    paths = []
    for words in ("one is fitted now", "nothing is fitted, there is a fitted compressor"):
        server = start_server(*FLAGS)
        assert words in server.log.read_text()
        state = server.info()["internal_states"][0]["metasoft"]["compressor"]
        assert state["kind"] == "fitted" and set(state["kept"]["4"]) == {"inside", "after"}
        paths.append(Path(state["path"]))
        response = server.generate(document[:6000], 4)
        assert response["meta_info"]["metasoft_span_tokens"] > 512
    assert paths[0] == paths[1] and tmp_path in paths[0].parents and (paths[0] / "report.html").is_file()
