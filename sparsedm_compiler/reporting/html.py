"""Style sheet, script and HTML elements of a report page; every text is escaped here."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --page: #f5f6f8; --ink: #1c232d; --soft: #5d6876;
  --line: #e1e5ea; --accent: #2563eb; --warn: #8a4b00; --warn-paper: #fff1dc; }
@media (prefers-color-scheme: dark) { :root { --paper: #151a21; --page: #0d1116; --ink: #e3e7ed;
  --soft: #98a3b2; --line: #2a323d; --accent: #7db0ff; --warn: #ffcf8f; --warn-paper: #3a2a10; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .35rem; letter-spacing: -.01em; }
h2 { font-size: 1.05rem; margin: 2.2rem 0 .7rem; }
p { margin: .3rem 0; max-width: 75ch; }
.soft, small, figcaption { color: var(--soft); }
small { font-size: .8rem; font-weight: 400; display: block; }
.card { background: var(--paper); border: 1px solid var(--line); border-radius: 10px;
  overflow: hidden; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .94rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .55rem .5rem; text-align: right; vertical-align: top; white-space: nowrap; }
th { font-weight: 600; }
thead th { border-bottom: 1px solid var(--line); font-size: .82rem; }
tbody tr + tr > * { border-top: 1px solid var(--line); }
.word { text-align: left; }
th button { all: unset; cursor: pointer; }
th button:hover { color: var(--accent); }
th button:focus-visible { outline: 2px solid var(--accent); outline-offset: 3px; }
.notes { padding: .6rem .95rem; margin: 0; list-style: none; color: var(--soft);
  font-size: .85rem; }
th:first-child { padding-left: .95rem; }
td:last-child, thead th:last-child { padding-right: .95rem; }
.pill { display: block; width: fit-content; padding: 0 .55rem; border-radius: 1rem;
  font-size: .78rem; color: var(--warn); background: var(--warn-paper); }
figure { margin: 0; }
img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
.grids { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(290px, 1fr)); }
.grids figure { padding: .8rem; }
.grids img { width: 100%; image-rendering: pixelated; background: #fff; border-radius: 4px; }
figcaption { padding-top: .5rem; font-size: .88rem; overflow-wrap: anywhere; }
.chart + .chart { margin-top: 1rem; }
.chart figcaption { padding: .7rem 1rem 0; font-weight: 600; }
details { padding: .55rem .85rem; }
details + details { border-top: 1px solid var(--line); }
summary { cursor: pointer; font-weight: 600; overflow-wrap: anywhere; }
pre { margin: .6rem 0 0; overflow-x: auto; font-size: .8rem; }
code { font-size: .92em; overflow-wrap: anywhere; }
@media (max-width: 700px) {
  main { padding: 1.2rem .8rem 3rem; }
  .chart img { width: 680px; max-width: none; }
  .stack thead { display: none; }
  .stack tr { display: block; padding: .6rem .85rem; }
  .stack tr > *:nth-child(n) { display: flex; justify-content: space-between; gap: 1rem;
    padding: .18rem 0; border: 0; white-space: normal; text-align: right; }
  .stack tbody tr + tr { border-top: 1px solid var(--line); }
  .stack tbody tr + tr > * { border: 0; }
  .stack tr > *::before { content: attr(data-label); color: var(--soft); font-weight: 400;
    text-align: left; }
  .stack tbody tr > th:first-child { font-size: 1.05rem; justify-content: flex-start;
    text-align: left; }
  .stack tbody tr > th:first-child::before { display: none; }
}
"""

SORT = """
for (const table of document.querySelectorAll("table.sort")) {
  table.querySelectorAll("thead th").forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    let way = -1;
    const compare = (a, b) => {
      const [x, y] = [a, b].map(row => row.children[column]);
      const [m, n] = [x, y].map(cell => cell.dataset.value);
      if (m && n) return way * (m - n);
      return !m - !n || way * x.textContent.localeCompare(y.textContent);
    };
    button.onclick = () => {
      way = -way;
      table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
    };
  });
}
"""

# The page may fetch nothing: it has no script but SORT, and its images are data: URIs.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: The text.
        detail: A smaller line below it.
        value: The number that the column is sorted by, None to sort by the text.
        title: The text on hover.
        left: Whether it is aligned to the left.
        badge: A highlighted remark behind the text.
    """

    text: str
    detail: str = ""
    value: float | None = None
    title: str = ""
    left: bool = False
    badge: str = ""

    def render(self, label: str, tag: str = "td") -> str:
        """Returns the element; ``label``, the head of its column, is shown on narrow screens."""
        attributes = f' data-label="{escape(label)}"' if label else ""
        attributes += "" if self.value is None else f' data-value="{self.value!r}"'
        attributes += f' title="{escape(self.title)}"' if self.title else ""
        attributes += ' class="word"' if self.left else ""
        badge = f' <span class="pill">{escape(self.badge)}</span>' if self.badge else ""
        detail = f"<small>{escape(self.detail)}</small>" if self.detail else ""
        return f"<{tag}{attributes}><span>{escape(self.text)}{badge}{detail}</span></{tag}>"


def make_table(
    heads: Sequence[Cell],
    rows: Sequence[Sequence[Cell]],
    *,
    kind: str = "",
    notes: Sequence[str] = (),
) -> str:
    """Returns a table whose rows begin with their name.

    ``kind`` are its CSS classes, ``notes`` a list below it.
    """
    head = "".join(cell.render("", "th") for cell in heads)
    body = []
    for first, *rest in rows:
        cells = [cell.render(head.text) for cell, head in zip(rest, heads[1:], strict=True)]
        body.append(f"<tr>{first.render('', 'th')}{''.join(cells)}</tr>")
    inner = f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody>"
    below = "".join(f"<li>{escape(note)}</li>" for note in notes)
    below = f'<ul class="notes">{below}</ul>' if below else ""
    return f'<div class="scroll card"><table class="{escape(kind)}">{inner}</table></div>{below}'


def make_picture(light: bytes, dark: bytes, about: str) -> str:
    """Returns an image in two versions, for a light and a dark colour scheme."""
    source = f'<source media="(prefers-color-scheme: dark)" srcset="{encode_png(dark)}">'
    image = f'<img src="{encode_png(light)}" alt="{escape(about)}">'
    return f"<picture>{source}{image}</picture>"


def encode_png(data: bytes) -> str:
    """Returns the bytes of a PNG as a data: URI."""
    return "data:image/png;base64," + base64.b64encode(data).decode("ascii")


def make_section(title: str, body: str) -> str:
    """Returns a section with a heading, nothing where its body is empty."""
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def make_document(title: str, lines: Sequence[str], sections: Sequence[str]) -> str:
    """Returns the whole page, with ``lines`` of text under its title."""
    intro = "".join(f'<p class="soft">{escape(line)}</p>' for line in lines)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><main><header><h1>{escape(title)}</h1>{intro}</header>\n"
        + "\n".join(sections)
        + f"\n</main><script>{SORT}</script></body></html>\n"
    )
