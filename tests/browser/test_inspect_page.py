"""The page of ``sglang-metasoft inspect`` in a real Chromium, made from the demo model and from long random data."""

import json
import re

import numpy as np
import pytest
import torch

from sglang_metasoft.config import MetaSoftConfig
from sglang_metasoft.inspect import inspection as inspections
from sglang_metasoft.inspect.command import main
from sglang_metasoft.inspect.inspected_model import Answer
from sglang_metasoft.inspect.page import render
from sglang_metasoft.inspect.prompt import InspectedPrompt
from sglang_metasoft.pipeline.plan import plan_span
from sglang_metasoft.types import Plan

pytestmark = pytest.mark.browser

HOSTILE = "</script><script>document.title='taken'</script><b>bold</b> <!-- &amp; <img src=x onerror=alert(1)> "
LONG_TOKENS = 8192
LAYERS, HEADS = 30, 3


@pytest.fixture(scope="session")
def model_dir(full_model_dir):
    return full_model_dir


@pytest.fixture(scope="module")
def page_file(model_dir, document, tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspect")
    (folder / "text.txt").write_text(HOSTILE + document[:3000])
    output = folder / "page.html"
    argv = [str(folder / "text.txt"), "--question", "What is asked for?", "--model-path", str(model_dir)]
    argv += ["--output", str(output), "--ratios", "2,4", "--max-new-tokens", "8"]
    argv += ["--metasoft-config", json.dumps({"consolidation": "attention_flow"})]  # values flow, which is shown
    assert main(argv) == 0
    return output


@pytest.fixture(scope="module")
def data(page_file):
    return json.loads(re.search(r'id="data">(.*?)</script>', page_file.read_text())[1])


def classes(page):
    return page.evaluate("[...document.querySelectorAll('#prompt .t')].map(token => token.className)")


def kept_tokens(page):
    return {n for n, name in enumerate(classes(page)) if re.search(r"\bk\d", name)}


def move(page, slider, value):
    page.locator(f"#{slider}").fill(str(value))
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def step_of(data, ratio):
    return next(n for n, (step, _) in enumerate(data["steps"]) if step == ratio)


def hover(page, index):
    token = page.locator("#prompt .t").nth(index)
    token.scroll_into_view_if_needed()
    token.hover()
    return page.locator("#detail").inner_text()


def test_prompt_text_is_shown_and_never_runs(open_page, page_file, data):
    page = open_page(page_file)
    assert page.title() == "MetaSoft: text.txt"
    assert page.locator("#prompt img, #prompt b, #prompt script").count() == 0
    shown = page.locator("#prompt").inner_text()
    assert HOSTILE.strip() in shown and "What is asked for?" in shown
    assert len(classes(page)) == len(data["tokens"])


def test_ratio_slider_changes_how_many_stay(open_page, page_file, data):
    page = open_page(page_file)
    page.locator("#layer").fill("3")
    page.locator("#head").fill("2")
    for ratio in (4, 2):
        move(page, "ratio", step_of(data, ratio))
        kept = dict(map(tuple, data["steps"]))[ratio]
        assert len(kept_tokens(page)) == kept - data["sinkTokens"]
        assert f"Compressed at ratio {ratio}" in page.locator("#answers").inner_text()
    names = classes(page)
    assert sum(name == "t sink" for name in names) == data["sinkTokens"]
    assert sum(name == "t window" for name in names) == len(names) - data["spanTokens"] == 64


def test_layer_and_head_sliders_choose_other_tokens_and_the_keyboard_moves_them(open_page, page_file):
    page = open_page(page_file)
    everywhere = classes(page)
    move(page, "layer", 1)
    move(page, "head", 1)
    first = kept_tokens(page)
    page.locator("#layer").press("ArrowRight")
    move(page, "head", 1)
    assert page.locator("#layer").get_attribute("aria-valuetext") == "1 (0 to 29)"
    second = kept_tokens(page)
    move(page, "head", 3)
    third = kept_tokens(page)
    assert len(first) == len(second) == len(third) and first != second != third
    assert classes(page) != everywhere


def test_pointing_at_a_dropped_token_shows_where_its_values_flow(open_page, page_file, data):
    page = open_page(page_file)
    move(page, "layer", 12)
    move(page, "head", 1)
    kept = kept_tokens(page)
    token = next(n for n in range(data["sinkTokens"], data["spanTokens"]) if n not in kept)
    text = hover(page, token)
    assert "dropped by this head" in text and "Its values flow to:" in text
    shares = [float(share) for share in page.locator("#detail .share").all_inner_texts()]
    assert 1 <= len(shares) <= 4 and sum(shares) == pytest.approx(1, abs=0.02) and shares == sorted(shares)[::-1]
    targets = {n for n, name in enumerate(classes(page)) if "flow" in name.split()}
    assert len(targets) == len(shares) and targets <= kept | set(range(data["sinkTokens"]))
    receiving = hover(page, min(targets))
    assert "Where it stays it receives from" in receiving
    assert token in {n for n, name in enumerate(classes(page)) if "flow" in name.split()} or "0.0" in receiving


def test_all_heads_together_and_the_window_have_their_own_words(open_page, page_file, data):
    page = open_page(page_file)
    assert re.search(r"kept by \d+ of 90 heads", hover(page, 40))
    assert "window" in hover(page, len(data["tokens"]) - 1)
    assert "as a sink" in hover(page, 0)


def test_tokens_can_be_walked_with_the_keyboard(open_page, page_file):
    page = open_page(page_file)
    page.locator("#prompt").focus()
    for key, index in (("ArrowRight", 0), ("ArrowRight", 1), ("ArrowDown", 11), ("ArrowLeft", 10)):
        page.keyboard.press(key)
        assert f"Token {index} of" in page.locator("#detail").inner_text()
    page.keyboard.press("Escape")
    assert "Point at a token" in page.locator("#detail").inner_text()


def test_the_heat_map_is_drawn_and_a_click_goes_to_its_layer(open_page, page_file):
    page = open_page(page_file)
    colors = page.evaluate(
        "(() => { const map = document.getElementById('map');"
        "const data = map.getContext('2d').getImageData(0, 0, map.width, map.height).data;"
        "return new Set(new Uint32Array(data.buffer)).size; })()"
    )
    assert colors > 50
    box = page.locator("#map").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.99)
    assert page.locator("#layer-out").inner_text() == "29 (0 to 29)"
    assert "Token" in page.locator("#detail").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_in_both_schemes(open_page, page_file, scheme):
    page = open_page(page_file, color_scheme=scheme)
    text, card = page.evaluate(
        "['color', 'backgroundColor'].map(name => getComputedStyle(document.querySelector('#prompt-panel'))[name])"
    )
    lights = sorted((luminance(text), luminance(card)))
    assert (lights[1] + 0.05) / (lights[0] + 0.05) > 7
    assert (luminance(card) > 0.5) == (scheme == "light")


def luminance(color):
    channels = [int(value) / 255 for value in re.findall(r"\d+", color)[:3]]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def test_every_control_has_a_name(open_page, page_file):
    page = open_page(page_file)
    for name in ("Ratio", "Layer", "KV head"):
        assert page.get_by_role("slider", name=name, exact=True).count() == 1
    assert page.get_by_role("img", name=re.compile("Heat map")).count() == 1
    assert page.get_by_role("group", name="Prompt tokens").count() == 1


@pytest.fixture(scope="module")
def long_file(tmp_path_factory):
    """A page of 8K tokens and 90 heads: random numbers, which compress worse than real ones."""
    rng = np.random.default_rng(0)
    config, ratios = MetaSoftConfig(), (2.0, 4.0, 8.0, 16.0)
    heads, span = LAYERS * HEADS, LONG_TOKENS - config.window
    rank = np.argsort(rng.random((heads, span)), axis=1).astype(np.uint16)
    results, steps = [], []
    for ratio in ratios:
        plan = plan_span(config, prompt_tokens=LONG_TOKENS, page_size=1, options={"ratio": ratio})
        assert isinstance(plan, Plan)
        shape = (heads, span - plan.kept_slots, config.route_targets)
        targets = rng.integers(0, plan.kept_slots, shape, dtype=np.uint16)
        weights = rng.integers(0, 128, shape, dtype=np.uint8)
        results.append(inspections.Result(ratio, plan, targets, weights, Answer([1], False, -1.0)))
        steps.append((ratio, plan.kept_slots))
    importance = inspections.encode_importance(np.exp(rng.normal(-9, 2, (heads, span))))
    texts = [f" word{n % 997}" + "\n" * (n % 90 == 0) for n in range(LONG_TOKENS)]
    inspection = inspections.Inspection(
        title="long", facts={}, prompt=InspectedPrompt([0] * LONG_TOKENS, texts), num_layers=LAYERS, num_kv_heads=HEADS,
        kv_bytes_per_entry=23040, importance=importance, rank=rank, gate_scale=np.ones(heads, np.float32), steps=steps,
        results=results, plain=Answer([1], False, -1.0), answer_texts=["a"] * 5,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("long") / "long.html"
    path.write_bytes(render(inspection))
    return path


def test_long_prompts_stay_within_a_bound_of_work(open_page, long_file):
    assert long_file.stat().st_size < 40e6  # random targets and weights: what a real prompt comes nowhere near
    page = open_page(long_file)
    entries = LAYERS * HEADS * (LONG_TOKENS - 64)
    before = page.evaluate("inspector.stats")
    move(page, "ratio", 0)
    after = page.evaluate("inspector.stats")
    assert after["updates"] - before["updates"] == 1
    assert after["cells"] - before["cells"] <= entries
    assert after["classWrites"] - before["classWrites"] <= LONG_TOKENS
    assert after["mapCells"] == before["mapCells"]
    hover(page, 4000)
    pointed = page.evaluate("inspector.stats")
    assert pointed["cells"] - after["cells"] <= 6 * entries  # once through every stored flow, 4 targets each
    assert pointed["classWrites"] - after["classWrites"] <= 100


def test_importance_codes_are_close(data):
    values = torch.logspace(-18, 0, 1000, dtype=torch.float64).numpy()
    codes = inspections.encode_importance(values.astype(np.float32)).astype(np.float64)
    decoded = 2 ** ((codes - 1) / data["log2Steps"] + data["log2Floor"])
    assert np.abs(decoded / values - 1).max() < 5e-4
    assert inspections.encode_importance(np.zeros(1, np.float32)) == [0]
