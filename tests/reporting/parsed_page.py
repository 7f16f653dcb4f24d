"""A report page, parsed: its tables, tags, links and words."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

from sparsedm_compiler.reporting import report_page


class ParsedPage(HTMLParser):
    """A parsed page: its tables as rows of texts, its tags, links and ids, and its text.

    ``attributes``: of every start tag, with its name.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, dict[str, str]]] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self.inside: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes.append((tag, {name: value or "" for name, value in attrs}))
        self.links += [value or "" for name, value in attrs if name in ("src", "srcset", "href")]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag in ("td", "th", "style", "script"):
            self.inside = tag
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = None if tag == self.inside else self.inside

    def handle_data(self, data: str) -> None:
        if self.inside not in ("style", "script"):
            self.words.append(data)
        if self.inside in ("td", "th"):
            self.tables[-1][-1][-1] = " ".join(f"{self.tables[-1][-1][-1]} {data}".split())

    def row(self, *starts: str) -> dict[str, str]:
        """The row of the first table whose cells after the run's name start so, by the heads."""
        heads, *rows = self.tables[0]
        (row,) = [cells for cells in rows if tuple(cells[1 : 1 + len(starts)]) == starts]
        return dict(zip(heads, row, strict=True))

    def column(self, head: str) -> list[str]:
        """The texts of a column of the first table."""
        heads, *rows = self.tables[0]
        return [row[heads.index(head)] for row in rows]

    @property
    def text(self) -> str:
        return " ".join(self.words)


def report(*runs: Path) -> ParsedPage:
    """Writes report.html beside the first run, and parses it."""
    out = runs[0].parent / "report.html"
    report_page(runs, out)
    return ParsedPage(out.read_text(encoding="utf-8"))
