"""The page: one HTML file with everything inside, for wide and narrow screens, light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from tables import Table

STYLE = """
:root { color-scheme: light dark; --ink: #1b1c1e; --paper: #ffffff; --line: #d5d8dc; --soft: #f3f4f6; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e9eb; --paper: #16181b; --line: #3b3f45; --soft: #202327; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; background: var(--paper); color: var(--ink);
       font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin-top: 2.5rem; } h3 { font-size: 1rem; }
nav a { margin-right: 0.9em; white-space: nowrap; } a { color: inherit; }
li { margin: 0.35rem 0; }
figure { margin: 1.2rem 0; } figcaption { font-size: 0.9rem; margin-top: 0.3rem; }
.wide { overflow-x: auto; -webkit-overflow-scrolling: touch; }
.wide svg { display: block; width: 100%; height: auto; min-width: 40rem; color: var(--ink);
            font-family: system-ui, sans-serif; }
table { border-collapse: collapse; font-size: 0.85rem; min-width: 40rem; }
th, td { text-align: left; vertical-align: top; padding: 0.3rem 0.6rem; border-bottom: 1px solid var(--line); }
th { background: var(--soft); }
summary { cursor: pointer; margin: 0.6rem 0; }
"""


@dataclass(frozen=True)
class Picture:
    """Args: svg: the element. caption: says what is drawn."""

    svg: str
    caption: str


@dataclass
class Part:
    """A part of the page: points in words, then tables, then pictures.

    Args:
        folded: title and table of what is shown on demand.
    """

    title: str
    points: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    folded: Sequence[tuple[str, Table]] = field(default_factory=tuple)


def page(title: str, introduction: str, parts: Sequence[Part]) -> str:
    """The whole HTML text; nothing in it is loaded from elsewhere."""
    links = "".join(f'<a href="#{_anchor(part.title)}">{escape(part.title)}</a> ' for part in parts)
    body = "\n".join(_part(part) for part in parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n<p>{escape(introduction)}</p>\n<nav>{links}</nav>\n{body}\n</body>\n</html>\n"
    )


def _anchor(title: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in title.lower())


def _part(part: Part) -> str:
    lines = [f'<h2 id="{_anchor(part.title)}">{escape(part.title)}</h2>']
    if part.points:
        lines.append("<ul>" + "".join(f"<li>{escape(point)}</li>" for point in part.points) + "</ul>")
    lines += [_table(table) for table in part.tables]
    for picture in part.pictures:
        svg = picture.svg.replace("<svg", f'<svg role="img" aria-label="{escape(picture.caption)}"', 1)
        caption = f"<figcaption>{escape(picture.caption)}</figcaption>"
        lines.append(f'<figure><div class="wide">{svg}</div>{caption}</figure>')
    for title, table in part.folded:
        lines.append(f"<details><summary>{escape(title)}</summary>{_table(table)}</details>")
    return "\n".join(lines)


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(word)}</th>" for word in table.header)
    rows = "".join("<tr>" + "".join(f"<td>{escape(word)}</td>" for word in row) + "</tr>" for row in table.rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
