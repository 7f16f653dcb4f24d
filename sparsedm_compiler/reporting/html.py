"""HTML elements of a report page; every text is escaped here."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from .script import SCRIPT
from .style_sheet import STYLE

# The page may fetch nothing: it has no script but SCRIPT, and its images are data: URIs.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


@dataclass(frozen=True, slots=True)
class Link:
    """A link to a place of the page: its text and the ``id`` of the element."""

    text: str
    anchor: str

    def render(self) -> str:
        """Returns the element."""
        return f'<a href="#{escape(self.anchor)}">{escape(self.text)}</a>'


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
        best: Whether it is marked as the best, before the text.
        pick: Of a head: whether rows can be filtered by the texts of its column.
        link: A link instead of the text.
        more: Links below.
    """

    text: str
    detail: str = ""
    value: float | None = None
    title: str = ""
    left: bool = False
    badge: str = ""
    best: bool = False
    pick: bool = False
    link: Link | None = None
    more: tuple[Link, ...] = ()

    def render(self, label: str, tag: str = "td") -> str:
        """Returns the element; ``label``, the head of its column, is shown on narrow screens."""
        attributes = f' data-label="{escape(label)}"' if label else ""
        attributes += "" if self.value is None else f' data-value="{self.value!r}"'
        attributes += f' title="{escape(self.title)}"' if self.title else ""
        attributes += ' class="word"' if self.left else ""
        attributes += " data-pick" if self.pick else ""
        text = escape(self.text) if self.link is None else self.link.render()
        badge = f' <span class="pill">{escape(self.badge)}</span>' if self.badge else ""
        best = '<span class="pill best">best</span> ' if self.best else ""
        detail = f"<small>{escape(self.detail)}</small>" if self.detail else ""
        more = " · ".join(link.render() for link in self.more)
        detail += f"<small>{more}</small>" if more else ""
        return f"<{tag}{attributes}><span>{best}{text}{badge}{detail}</span></{tag}>"


@dataclass(frozen=True, slots=True)
class Section:
    """A section of a page: its heading, its ``id``, and its body in HTML; empty: no section."""

    title: str
    anchor: str
    body: str

    def render(self) -> str:
        """Returns the element."""
        return f'<section id="{self.anchor}"><h2>{escape(self.title)}</h2>{self.body}</section>'


def make_table(
    heads: Sequence[Cell], rows: Sequence[Sequence[Cell]], *, notes: Sequence[str] = ()
) -> str:
    """Returns a table whose rows begin with their name; ``notes`` are a list below it."""
    head = "".join(cell.render("", "th") for cell in heads)
    body = []
    for first, *rest in rows:
        cells = [cell.render(head.text) for cell, head in zip(rest, heads[1:], strict=True)]
        body.append(f"<tr>{first.render('', 'th')}{''.join(cells)}</tr>")
    inner = f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody>"
    below = "".join(f"<li>{escape(note)}</li>" for note in notes)
    below = f'<ul class="notes">{below}</ul>' if below else ""
    return f'<div class="scroll card"><table class="sort stack">{inner}</table></div>{below}'


def make_picture(light: bytes, dark: bytes, about: str) -> str:
    """Returns an image in two versions, for a light and a dark colour scheme."""
    source = f'<source media="(prefers-color-scheme: dark)" srcset="{encode_png(dark)}">'
    image = f'<img src="{encode_png(light)}" alt="{escape(about)}">'
    return f"<picture>{source}{image}</picture>"


def make_zoomable_figure(image: bytes, caption: str, number: int, *, kind: str = "") -> str:
    """Returns a PNG that a click shows in full size, and a click closes, without any script.

    The links go to the figure, which CSS enlarges while it is the target, and back to its image.
    ``caption`` is HTML, ``kind`` a CSS class, ``number`` unique among the figures of the page.
    """
    full, small = f"full-{number}", f"samples-{number}"
    return (
        f'<figure class="card {kind}" id="{full}"><a class="close" href="#{small}">close</a>'
        f'<a class="zoom" id="{small}" href="#{full}" title="full size">'
        f'<img src="{encode_png(image)}" alt="sample grid"></a>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def encode_png(data: bytes) -> str:
    """Returns the bytes of a PNG as a data: URI."""
    return "data:image/png;base64," + base64.b64encode(data).decode("ascii")


def make_document(title: str, lines: Sequence[str], sections: Sequence[Section]) -> str:
    """Returns the whole page, with ``lines`` of text under its title and links to its sections."""
    intro = "".join(f'<p class="soft">{escape(line)}</p>' for line in lines)
    shown = [section for section in sections if section.body]
    links = "".join(Link(section.title, section.anchor).render() for section in shown)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><main><header><h1>{escape(title)}</h1>{intro}</header>\n<nav>{links}</nav>\n"
        + "\n".join(section.render() for section in shown)
        + f"\n</main><script>{SCRIPT}</script></body></html>\n"
    )
