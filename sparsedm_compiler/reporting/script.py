"""The script of a report page: it sorts and filters tables; without it the page is whole."""

from __future__ import annotations

SCRIPT = """
const add = (parent, tag, values = {}) => {
  const element = Object.assign(document.createElement(tag), values);
  parent.append(element);
  return element;
};
const compare = (column, way) => (a, b) => {
  const [x, y] = [a, b].map(row => row.cells[column]);
  const [m, n] = [x, y].map(cell => cell.dataset.value);
  if (m && n) return way * (m - n);
  const options = { numeric: true };
  return !m - !n || way * x.textContent.localeCompare(y.textContent, undefined, options);
};
const sort = (table, column, way) => {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach(head => head.removeAttribute("aria-sort"));
  heads[column].setAttribute("aria-sort", way > 0 ? "ascending" : "descending");
  table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare(column, way)));
};
const addControls = (table, heads, titles) => {
  const rows = [...table.tBodies[0].rows];
  const bar = document.createElement("div");
  bar.className = "controls";
  const search = add(bar, "input", { type: "search", placeholder: "filter rows" });
  search.setAttribute("aria-label", "filter rows");
  const picks = [];
  heads.forEach((head, column) => {
    const texts = new Set(rows.map(row => row.cells[column].textContent));
    if (!("pick" in head.dataset) || texts.size < 2) return;
    const select = add(bar, "select");
    select.setAttribute("aria-label", titles[column]);
    add(select, "option", { value: "", textContent: "any " + titles[column] });
    texts.forEach(text => add(select, "option", { value: text, textContent: text }));
    picks.push([column, select]);
  });
  const order = add(bar, "select", { className: "order" });
  order.setAttribute("aria-label", "sort by");
  add(order, "option", { value: "", textContent: "sort by" });
  titles.forEach((title, column) => [1, -1].forEach(way => add(order, "option",
    { value: `${column} ${way}`, textContent: title + (way > 0 ? " \\u25B2" : " \\u25BC") })));
  order.onchange = () => order.value && sort(table, ...order.value.split(" ").map(Number));
  const count = add(bar, "output");
  const filter = () => {
    const words = search.value.toLowerCase().split(/\\s+/);
    rows.forEach(row => row.hidden = !(
      picks.every(([column, select]) =>
        !select.value || row.cells[column].textContent === select.value)
      && words.every(word => row.textContent.toLowerCase().includes(word))));
    const shown = rows.filter(row => !row.hidden).length;
    count.textContent = shown < rows.length ? `${shown} of ${rows.length} rows` : "";
  };
  bar.oninput = filter;
  table.closest(".card").before(bar);
};
for (const table of document.querySelectorAll("table.sort")) {
  if (table.tBodies[0].rows.length < 2) continue;
  const heads = [...table.tHead.rows[0].cells];
  const titles = heads.map(head => head.textContent);
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.onclick = () =>
      sort(table, column, head.getAttribute("aria-sort") === "ascending" ? -1 : 1);
  });
  addControls(table, heads, titles);
}
const reveal = () => {
  const target = document.getElementById(location.hash.slice(1));
  if (target && target.tagName === "DETAILS") target.open = true;
};
addEventListener("hashchange", reveal);
reveal();
const closeFullSize = () => {
  const open = document.querySelector(".grids figure:target .close");
  if (open) open.click();
  return open;
};
addEventListener("keydown", event => event.key === "Escape" && closeFullSize());
for (const link of document.querySelectorAll(".zoom"))
  link.onclick = event => closeFullSize() && event.preventDefault();
"""
