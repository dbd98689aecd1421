"""The page at / in a real browser: one width, two side by side, desk and telephone, light and dark."""

import shutil

import pytest

api = pytest.importorskip("playwright.sync_api")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs chromium")


@pytest.fixture(scope="module")
def browser():
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield started
        started.close()


def say(page, text):
    """Ask, and wait for all answers."""
    page.fill("#text", text)
    page.click("#send")
    page.wait_for_function("!document.getElementById('send').disabled", timeout=30_000)


@pytest.mark.parametrize("width, height", [(1200, 800), (390, 780)])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_two_widths_side_by_side(browser, address, width, height, scheme):
    page = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme).new_page()
    faults = []
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(address)
    page.wait_for_function("document.querySelectorAll('#first option').length > 1")
    assert page.inner_text("h1") == "polybit · tinychat" and page.is_visible(".hint")
    assert not page.is_visible("#key")  # no key is asked for
    assert page.eval_on_selector_all("#first option", "all => all.map(o => o.value)") == [
        "w8",
        "w4",
        "w3",
        "w2",
        "auto",
    ]
    say(page, "What is the capital of France?")
    assert page.locator(".answer").count() == 1 and not page.is_visible(".hint")
    facts = page.inner_text(".answer .facts").replace("\xa0", " ")
    assert facts.startswith("w8 (request)") and "tokens/s" in facts and "MB per token" in facts
    page.select_option("#second", "w2")
    say(page, "Tell me about a cat.")
    assert page.locator(".answers").nth(1).locator(".answer").count() == 2
    flips = page.locator(".flip")
    assert flips.count() == 2 and "nats – here the answers part" in flips.first.get_attribute("title")
    flips.first.click()  # where nothing can be pointed at
    assert "lead over the second token" in page.locator(".facts").nth(1).inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing hangs over the edge
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, paper[4:-1].split(","))) < 200) == (scheme == "dark")
    page.click("#clear")
    assert page.locator(".answer").count() == 0 and page.is_visible(".hint")
    assert not faults
    page.context.close()


def test_an_answer_can_be_stopped(browser, address, service):
    page = browser.new_page()
    page.goto(address)
    page.wait_for_function("document.querySelectorAll('#first option').length > 1")
    page.route("**/v1/chat/completions", lambda route: None)  # an answer that never comes
    page.fill("#text", "Hello")
    page.click("#send")
    page.click("#stop")
    page.wait_for_function("!document.getElementById('send').disabled")
    assert page.inner_text(".error") == "stopped"
    page.close()
