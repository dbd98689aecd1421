"""How every page looks: light and dark, on a desk and on a telephone; and the frame of those without a template."""

from __future__ import annotations

from html import escape
from pathlib import PurePath

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --mark: #e76f51; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: 0; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
.sub { opacity: .7; margin-top: .2rem; }
/* a shadow at the edge says that there is more to the side */
.scroll { overflow-x: auto; background:
  linear-gradient(to right, Canvas 30%, transparent) left / 2rem 100% no-repeat local,
  linear-gradient(to left, Canvas 30%, transparent) right / 2rem 100% no-repeat local,
  linear-gradient(to right, #8886, transparent) left / .8rem 100% no-repeat scroll,
  linear-gradient(to left, #8886, transparent) right / .8rem 100% no-repeat scroll; }
pre { overflow-x: auto; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1rem 0; background: #fff; color: #000; border-radius: 6px; padding: .5rem; }
figure svg { display: block; width: 100%; height: auto; max-height: 26rem; }
@media (max-width: 40rem) { figure { margin: 1rem -1rem; padding: 0; border-radius: 0; } }
@media (prefers-color-scheme: dark) {
  figure { background: #1f1f1f; } figure svg { filter: invert(.88) hue-rotate(180deg); }
}
figure.tall svg { max-height: 60rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: 1rem; }
.pair figure { min-width: 0; }
.answer { border: 1px solid var(--line); border-radius: 6px; padding: .6rem .8rem; margin: .6rem 0; }
.answer .prompt { font-weight: 600; white-space: pre-wrap; }
.answer td { text-align: left; white-space: pre-wrap; vertical-align: top; }
mark { background: var(--mark); color: #fff; border-radius: 3px; padding: 0 .15em; }
.after { opacity: .65; } code { background: var(--soft); padding: .1em .3em; border-radius: 3px; }
p.caption { font-weight: 600; margin-bottom: .3rem; }
.scroll + .scroll { margin-top: 1.2rem; }
th.row { white-space: nowrap; vertical-align: middle; }
@media (max-width: 40rem) { th.row { white-space: normal; min-width: 7rem; } }
td small { display: block; opacity: .75; }
.verdict { border-left: 4px solid #46c; padding: .4rem 1rem; background: var(--soft); }
p.note { opacity: .75; font-size: .9rem; }
"""


def framed(title: str, *parts: str) -> str:
    """One self-contained HTML page; title: text, the heading too · parts: HTML."""
    name = escape(title)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}</title><style>{STYLE}</style></head><body><h1>{name}</h1>{''.join(parts)}</body></html>\n"
    )


def scrolled(table: str) -> str:
    """A table that is moved to the side where the page is too narrow for it."""
    return f'<div class="scroll">{table}</div>'


def pictured(svg: str) -> str:
    """A figure."""
    return f"<figure>{svg}</figure>"


def short_name(model: object) -> str:
    """A model as a heading names it: without the folders it lies in."""
    return PurePath(str(model)).name or str(model)
