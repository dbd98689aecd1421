"""The site of the documentation builds without a warning, and every page of docs/ is in it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs")
pytest.importorskip("material")
pytest.importorskip("mkdocstrings")

ROOT = Path(__file__).parent.parent.parent
HREF = re.compile(r'(?:href|src)="([^"#]+)"')


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    place = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(place)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    return place


def test_every_page_is_there_and_no_link_is_dead(site):
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").with_suffix(".html")
        assert (site / (name.with_name("index.html") if page.stem == "README" else name)).is_file(), page
    assert {"contributing.html", "changelog.html", "api/core.html"} <= {
        path.relative_to(site).as_posix() for path in site.rglob("*.html")
    }
    for page in site.rglob("*.html"):
        for link in HREF.findall(page.read_text()):
            if not re.match(r"[a-z]+:|//|/", link):
                assert (page.parent / link).exists(), f"{page.relative_to(site)}: {link}"


def test_nothing_is_fetched_from_elsewhere(site):
    """A reader without a network sees the same page."""
    fetched = re.compile(r'<(?:script|link|img)[^>]+(?:src|href)="(https?:)?//[^"]+"')
    assert not [page.name for page in site.rglob("*.html") if fetched.search(page.read_text())]


def test_the_reference_explains_every_act(site):
    import polybit

    text = (site / "api" / "library.html").read_text()
    for name, where in polybit._PUBLIC.items():
        assert where != "polybit.library" or f"polybit.{name}<" in text, name
