"""How fluid a page of ``sglang-metasoft inspect`` is: opening, sliders and pointing in a real Chromium, offline.

    sglang-metasoft inspect long.txt --output long.html
    python benchmarks/inspect_page.py long.html --screenshot docs/inspect.png

A slider's figure is from the key press to the frame that shows the change.
"""

import argparse
import json
import shutil
import statistics
import sys
import time
from pathlib import Path

ARGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
REPEATS = 20
# Resolves with the milliseconds until the frame after the change was drawn.
CHANGE = """([slider, value]) => new Promise((done) => {
  const element = document.getElementById(slider);
  const began = performance.now();
  element.value = value;
  element.dispatchEvent(new Event("input"));
  requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now() - began)));
})"""
POINT = """(index) => new Promise((done) => {
  const token = document.querySelectorAll("#prompt .t")[index];
  const began = performance.now();
  token.dispatchEvent(new MouseEvent("mouseover", { bubbles: true }));
  requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now() - began)));
})"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--screenshot", type=Path)
    parser.add_argument("--dark", action="store_true")
    args = parser.parse_args()
    chromium = shutil.which("chromium")
    if chromium is None:
        sys.exit("Chromium is not installed: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver, driver.chromium.launch(executable_path=chromium, args=list(ARGS)) as browser:
        scheme = "dark" if args.dark else "light"
        page = browser.new_page(viewport={"width": 1400, "height": 1000}, offline=True, color_scheme=scheme)
        began = time.perf_counter()
        page.goto(args.page.resolve().as_uri())
        page.wait_for_selector("html[data-state=ready]", state="attached", timeout=300_000)
        print(json.dumps({"megabytes": round(args.page.stat().st_size / 1e6, 1), "open_seconds": since(began)}))
        measure(page)
        if args.screenshot:
            take(page, args.screenshot)
    return 0


def since(began: float) -> float:
    return round(time.perf_counter() - began, 1)


def measure(page) -> None:
    tokens = page.locator("#prompt .t").count()
    start = page.locator("#ratio").input_value()
    tops = {slider: int(page.locator(f"#{slider}").get_attribute("max")) for slider in ("ratio", "layer", "head")}
    for slider, top in tops.items():
        times = [page.evaluate(CHANGE, [slider, n % (top + 1)]) for n in range(REPEATS)]
        show(f"{slider} slider", times, tokens)
        page.evaluate(CHANGE, [slider, start if slider == "ratio" else 0])
    points = [(tokens // REPEATS) * n for n in range(REPEATS)]
    show("pointing, all heads", [page.evaluate(POINT, n) for n in points], tokens)
    for slider in ("layer", "head"):
        page.evaluate(CHANGE, [slider, 1])
    show("pointing, one head", [page.evaluate(POINT, n) for n in points], tokens)
    for slider in ("layer", "head"):
        page.evaluate(CHANGE, [slider, 0])


def show(what: str, times: list[float], tokens: int) -> None:
    figures = {"median_ms": round(statistics.median(times), 1), "worst_ms": round(max(times), 1)}
    print(json.dumps({"what": what, "tokens": tokens} | figures))


def take(page, path: Path) -> None:
    """One dropped token pointed at, its flows in view."""
    page.locator("#prompt").focus()
    page.keyboard.press("Escape")
    names = page.evaluate("[...document.querySelectorAll('#prompt .t')].map(token => token.className)")
    page.locator("#prompt .t").nth(next(n for n, name in enumerate(names) if n > 60 and name == "t")).hover()
    page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    page.set_viewport_size({"width": 1400, "height": 1120})
    page.wait_for_timeout(300)
    page.screenshot(path=path)


if __name__ == "__main__":
    sys.exit(main())
