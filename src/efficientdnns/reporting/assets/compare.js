"use strict";
const figures = [...document.querySelectorAll("figure[data-axis]")];
const choices = document.querySelector(".choices");
const readout = document.querySelector(".readout");

function show(axis) {
  for (const figure of figures) figure.hidden = figure.dataset.axis !== axis;
}
if (figures.length) {
  choices.hidden = figures.length < 2;
  choices.addEventListener("change", (event) => show(event.target.value));
  readout.hidden = false;
  show((choices.querySelector("input:checked") || choices.querySelector("input")).value);
}

function choose(run, words) {
  for (const item of document.querySelectorAll("[data-run]")) item.classList.toggle("chosen", item.dataset.run === run);
  if (words) readout.textContent = words;
}
function open(run) {
  const target = document.getElementById("run-" + run);
  if (!target) return;
  target.open = true;
  target.scrollIntoView({ block: "start" });
  target.querySelector("summary").focus({ preventScroll: true });
}
for (const point of document.querySelectorAll(".point")) {
  const words = point.getAttribute("aria-label");
  const run = point.dataset.run;
  for (const name of ["pointerenter", "focus"]) point.addEventListener(name, () => choose(run, words));
  if (!run) continue;
  point.addEventListener("click", () => choose(run, words));
  point.addEventListener("dblclick", () => open(run));
  point.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    open(run);
  });
}
for (const row of document.querySelectorAll("tr[data-run]")) {
  row.addEventListener("pointerenter", () => choose(row.dataset.run));
  row.querySelector("a").addEventListener("click", (event) => {
    event.preventDefault();
    open(row.dataset.run);
  });
}

function order(a, b, column, sign) {
  const [x, y] = [a.cells[column], b.cells[column]];
  const numeric = "value" in x.dataset || "value" in y.dataset;
  if (!numeric) return sign * x.textContent.localeCompare(y.textContent, undefined, { numeric: true });
  if (!("value" in x.dataset)) return 1;
  if (!("value" in y.dataset)) return -1;
  return sign * (Number(x.dataset.value) - Number(y.dataset.value));
}
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const descending = heading.getAttribute("aria-sort") === "ascending";
      for (const other of headings) other.setAttribute("aria-sort", "none");
      heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => order(a, b, column, descending ? -1 : 1));
      table.tBodies[0].append(...rows);
    });
  });
}
