"""Write the tables of docs/results and README.md from the numbers that stand as JSON beside them.

    python -m benchmarks.pages            # rewrite what stands between the marks
    python -m benchmarks.pages --check    # exit with 1 and name the pages that are not what their numbers give

A mark is `<!-- table: PAGE.NAME -->` … `<!-- end -->`: the table NAME of docs/results/data/PAGE.json.
`<!-- index: PAGE … -->` is a list of the questions and answers of pages. A table in JSON has

    columns: [title, template, template, …]: of the templates the first whose names a row all has gives the cell
    rows:    one object per row; "best" names the numbers to set in bold
    of:      another table of the file whose rows these are, `where` = {name: values to keep}

Numbers keep the digits they are written with: 0.1040 stays 0.1040.
"""

from __future__ import annotations

import json
import re
import string
import sys
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
MARKED = re.compile(r"<!-- (table|index): (.+?) -->\n(.*?)<!-- end -->", re.DOTALL)


class Written(float):
    """A number that keeps the digits it was written with."""

    text: str

    def __new__(cls, text: str) -> Written:
        """The number that the text of the JSON file says."""
        number = super().__new__(cls, text)
        number.text = text
        return number

    def __format__(self, spec: str) -> str:
        """As written, with a plus sign where `spec` asks for one."""
        return "+" + self.text if "+" in spec and self > 0 else self.text


class Cells(string.Formatter):
    """Fills a template with the numbers of a row."""

    def __init__(self, best: list[str]) -> None:
        self.best = best

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> Any:
        """The number and its name, so that it can be set in bold."""
        return (kwargs[field_name], field_name in self.best), field_name

    def format_field(self, value: Any, format_spec: str) -> str:
        """The number as it was written, with a true minus sign."""
        number, bold = value
        text = re.sub(r"^-", "−", format(number, format_spec)) if isinstance(number, int | float) else str(number)
        return f"**{text}**" if bold else text


def load(page: str) -> dict[str, Any]:
    """The numbers of a page, every digit kept."""
    return json.loads((RESULTS / "data" / f"{page}.json").read_text(), parse_float=Written)


def cell(row: dict[str, Any], templates: list[str]) -> str:
    """The first template that the row has all names of; nothing where there is none."""
    for template in templates:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name]
        if all(name in row for name in names):
            return Cells(row.get("best", [])).vformat(template, (), row)
    return ""


def table(page: str, name: str) -> str:
    """A table as Markdown."""
    tables = load(page)["tables"]
    found = tables[name]
    rows = tables[found.get("of", name)]["rows"]
    where = found.get("where", {})
    rows = [row for row in rows if all(row.get(key) in values for key, values in where.items())]
    head = [title for title, *_ in found["columns"]]
    lines = [head, ["---"] * len(head)]
    lines += [[cell(row, templates) for _, *templates in found["columns"]] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def parts(text: str) -> tuple[str, str]:
    """The question and the answer of a page: its title and the paragraph below."""
    title, _, rest = text.partition("\n\n")
    return title.removeprefix("# ").strip(), " ".join(rest.partition("\n\n")[0].split())


def index(pages: list[str]) -> str:
    """One line per page: the question, linked, and its answer."""
    lines = []
    for page in pages:
        question, answer = parts((RESULTS / f"{page}.md").read_text())
        line = f"- [{question}]({page}.md) {answer}".replace(" %", "\u00a0%")  # a number keeps its sign beside it
        lines.append(textwrap.fill(line, 120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False))
    return "\n".join(lines).replace("\u00a0%", " %") + "\n"


def filled(text: str) -> str:
    """The text of a page with everything between marks written anew."""

    def write(match: re.Match[str]) -> str:
        kind, what, _ = match.groups()
        body = index(what.split()) if kind == "index" else table(*what.split("."))
        return f"<!-- {kind}: {what} -->\n{body}<!-- end -->"

    return MARKED.sub(write, text)


def marked_pages() -> list[Path]:
    """Every page that may hold a mark, the index last."""
    pages = sorted(path for path in RESULTS.glob("*.md") if path.name != "README.md")
    return [ROOT / "README.md", ROOT / "docs" / "scale.md", *pages, RESULTS / "README.md"]


def main(arguments: list[str]) -> int:
    """Rewrite the pages, or with --check only say which are not what their numbers give."""
    stale = [path for path in marked_pages() if path.read_text() != filled(path.read_text())]
    for path in stale:
        if "--check" in arguments:
            print(f"{path.relative_to(ROOT)} is not what its numbers give: run python -m benchmarks.pages")
        else:
            path.write_text(filled(path.read_text()))
    return int("--check" in arguments and bool(stale))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
