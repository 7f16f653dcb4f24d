"""The style sheet of a report page: light and dark, wide and narrow."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --page: #f5f6f8; --ink: #1c232d; --soft: #5d6876;
  --line: #e1e5ea; --accent: #2563eb; --warn: #8a4b00; --warn-paper: #fff1dc; --good: #0b6b3a;
  --good-paper: #dff5e7; }
@media (prefers-color-scheme: dark) { :root { --paper: #151a21; --page: #0d1116; --ink: #e3e7ed;
  --soft: #98a3b2; --line: #2a323d; --accent: #7db0ff; --warn: #ffcf8f; --warn-paper: #3a2a10;
  --good: #8fe3b0; --good-paper: #12341f; } }
* { box-sizing: border-box; }
html { scroll-padding-top: 3.2rem; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1360px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .35rem; letter-spacing: -.01em;
  overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 2.2rem 0 .7rem; }
p { margin: .3rem 0; max-width: 75ch; overflow-wrap: anywhere; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
a:focus-visible, button:focus-visible, summary:focus-visible { outline: 2px solid var(--accent);
  outline-offset: 3px; }
nav { position: sticky; top: 0; z-index: 3; display: flex; gap: 1.1rem; overflow-x: auto;
  margin: 1rem 0 0; padding: .55rem 0; background: var(--page); white-space: nowrap;
  border-bottom: 1px solid var(--line); }
.soft, small, figcaption { color: var(--soft); }
small { font-size: .8rem; font-weight: 400; display: block; }
.card { background: var(--paper); border: 1px solid var(--line); border-radius: 10px;
  overflow: hidden; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .94rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .55rem .5rem; text-align: right; vertical-align: top; white-space: nowrap; }
th { font-weight: 600; }
thead th { border-bottom: 1px solid var(--line); font-size: .82rem; vertical-align: bottom;
  white-space: normal; }
tbody tr + tr > * { border-top: 1px solid var(--line); }
tbody tr > th:first-child { white-space: normal; min-width: 10rem; max-width: 22rem;
  overflow-wrap: anywhere; }
th:first-child { position: sticky; left: 0; background: var(--paper); }
.word { text-align: left; }
th button { all: unset; cursor: pointer; }
th button:hover { color: var(--accent); }
th button:focus-visible { outline: 2px solid var(--accent); outline-offset: 3px; }
th[aria-sort] button::after { content: " \\25B2"; font-size: .7em; }
th[aria-sort="descending"] button::after { content: " \\25BC"; }
.controls { display: flex; flex-wrap: wrap; align-items: center; gap: .5rem; margin: 0 0 .6rem; }
.controls input, .controls select { font: inherit; font-size: .88rem; color: inherit;
  background: var(--paper); border: 1px solid var(--line); border-radius: 6px;
  padding: .25rem .5rem; min-width: 0; max-width: 100%; }
.controls output { color: var(--soft); font-size: .85rem; }
.controls .order { display: none; }
[hidden] { display: none !important; }
.notes { padding: .6rem .95rem; margin: 0; list-style: none; color: var(--soft);
  font-size: .85rem; overflow-wrap: anywhere; }
th:first-child { padding-left: .95rem; }
td:last-child, thead th:last-child { padding-right: .95rem; }
.pill { display: inline-block; padding: 0 .5rem; border-radius: 1rem; font-size: .74rem;
  font-weight: 600; color: var(--warn); background: var(--warn-paper); }
.best { color: var(--good); background: var(--good-paper); }
figure { margin: 0; }
img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
.grids { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(290px, 1fr)); }
.grids figure { padding: .8rem; }
.grids img { width: 100%; background: #fff; border-radius: 4px; }
.grids .real { border-color: var(--accent); }
.zoom { display: block; cursor: zoom-in; }
.close { display: none; }
.grids figure:target { position: fixed; inset: 0; z-index: 9; overflow: auto; border-radius: 0;
  padding: 1rem; }
.grids figure:target img { width: auto; max-width: none; margin: 0; }
.grids figure:target .zoom { cursor: zoom-out; width: max-content; }
.grids figure:target .close { display: block; position: sticky; left: 0; width: max-content;
  padding: 0 0 .6rem; }
figcaption { padding-top: .5rem; font-size: .88rem; overflow-wrap: anywhere; }
.chart + .chart { margin-top: 1rem; }
.chart figcaption { padding: .7rem 1rem 0; font-weight: 600; }
details { padding: .55rem .85rem; }
details + details { border-top: 1px solid var(--line); }
summary { cursor: pointer; font-weight: 600; overflow-wrap: anywhere; }
pre { margin: .6rem 0 0; overflow-x: auto; font-size: .8rem; }
@media (max-width: 700px) {
  main { padding: 1.2rem .8rem 3rem; }
  .chart img { width: 680px; max-width: none; }
  .controls .order { display: block; }
  .stack thead { display: none; }
  .stack th:first-child { position: static; }
  .stack tr { display: block; padding: .6rem .85rem; }
  .stack tr > *:nth-child(n) { display: flex; justify-content: space-between; gap: 1rem;
    padding: .18rem 0; border: 0; white-space: normal; text-align: right; min-width: 0;
    max-width: none; }
  .stack td > span { min-width: 0; overflow-wrap: anywhere; }
  .stack tbody tr + tr { border-top: 1px solid var(--line); }
  .stack tbody tr + tr > * { border: 0; }
  .stack tr > *::before { content: attr(data-label); color: var(--soft); font-weight: 400;
    text-align: left; }
  .stack tbody tr > th:first-child { font-size: 1.05rem; justify-content: flex-start;
    text-align: left; }
  .stack tbody tr > th:first-child::before { display: none; }
}
"""
