"""A real Chromium without a network."""

import pytest

from tests.tools import need

ARGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    chromium = need("chromium", "chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        with driver.chromium.launch(executable_path=chromium, args=list(ARGS)) as running:
            yield running


@pytest.fixture
def open_page(browser):
    """Open a file offline; whatever the page complains about fails the test at its end."""
    contexts, complaints = [], []

    def open(path, **options):
        context = browser.new_context(viewport={"width": 1400, "height": 1000}, offline=True, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: complaints.append(request.url) if request.url.startswith("http") else None)
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-state=ready]", state="attached", timeout=120_000)
        return page

    yield open
    for context in contexts:
        context.close()
    assert complaints == []
