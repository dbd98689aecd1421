"""Pages in a real browser: nothing hangs over the edge of a telephone, and dark where dark is asked for."""

import shutil

import pytest

from polybit.report.frame import framed, pictured, scrolled, short_name
from polybit.report.plots import lines_over
from polybit.report.study_reading import html_table

api = pytest.importorskip("playwright.sync_api")
pytest.importorskip("matplotlib")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
SCREENS = [(1200, 900, "light"), (390, 780, "dark")]


@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_wide_tables_and_figures_stay_on_the_page(tmp_path):
    wide = [["a row with a long name", *(f"{n / 7:.4f} [0.1000, 0.9000]" for n in range(12))]]
    drawn = lines_over({"one": [(1.0, 2.0), (3.0, 1.0)]}, "x", "y")
    table = html_table([""] + ["column"] * 12, wide)
    (tmp_path / "page.html").write_text(framed("A <page>", pictured(drawn), table, scrolled(table)))
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        for width, height, scheme in SCREENS:
            shown = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme).new_page()
            shown.goto(f"file://{tmp_path / 'page.html'}")
            assert shown.inner_text("h1") == "A <page>"
            assert shown.evaluate("document.documentElement.scrollWidth") == width
            box = shown.locator("figure svg").bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["height"] > 100
            ink = shown.evaluate("getComputedStyle(document.body).color")
            assert (sum(map(int, ink[4:-1].split(","))) > 400) == (scheme == "dark")
        browser.close()


def test_a_heading_names_a_model_without_its_folders():
    assert short_name("/models/some/smollm2") == "smollm2" and short_name("Qwen/Qwen3-0.6B") == "Qwen3-0.6B"
    assert short_name("tinychat") == "tinychat" and short_name("/") == "/"
