"use strict";
/* Runs in the page that holds all pages in frames; leaves what it found as JSON. */
function size(element) {
  const box = element.getBoundingClientRect();
  return [box.width, box.height];
}
const visible = (element) => element.checkVisibility();

function probe(frame) {
  const page = frame.contentDocument;
  const look = (selector) => [...page.querySelectorAll(selector)].filter(visible);
  const found = {
    requests: frame.contentWindow.performance.getEntriesByType("resource").length,
    background: frame.contentWindow.getComputedStyle(page.body).backgroundColor,
    figures: look("figure svg[role=img]").map(size),
    bars: look(".layer svg").map(size),
    marks: look("figure circle, figure polyline").map(size),
    text: Math.min(...look("p, td, th, span, text, figcaption").map((e) => parseFloat(frame.contentWindow.getComputedStyle(e).fontSize))),
  };
  for (const closed of page.querySelectorAll("details")) closed.open = true;
  found.width = page.documentElement.clientWidth;
  found.needed = page.documentElement.scrollWidth;
  return found;
}

function use(frame) {
  const page = frame.contentDocument;
  const window = frame.contentWindow;
  for (const details of page.querySelectorAll("details")) details.open = false;
  const order = () => [...page.querySelectorAll("table.runs tbody tr")].map((row) => row.dataset.run);
  const heading = (text) => [...page.querySelectorAll("table.runs th[aria-sort]")].find((th) => th.textContent === text);
  const found = { given: order(), sorted: {} };
  for (const name of ["size of the file", "accuracy", "run"]) {
    const button = heading(name).querySelector("button");
    button.focus();
    const focused = page.activeElement === button;
    button.click();
    const up = [order(), heading(name).getAttribute("aria-sort")];
    button.click();
    const others = [...page.querySelectorAll("table.runs th")].filter((th) => !["none", null].includes(th.getAttribute("aria-sort")));
    found.sorted[name] = { focused, up, down: [order(), heading(name).getAttribute("aria-sort")], marked: others.length };
  }
  const axes = () => [...page.querySelectorAll("figure[data-axis]")].filter(visible).map((figure) => figure.dataset.axis);
  found.axis = axes();
  page.querySelector("input[value=macs]").click();
  found.other = axes();
  const point = [...page.querySelectorAll(".point[data-run='2']")].find(visible);
  point.dispatchEvent(new window.MouseEvent("click", { bubbles: true }));
  found.readout = page.querySelector(".readout").textContent;
  found.chosen = [...page.querySelectorAll("tr.chosen")].map((row) => row.dataset.run);
  point.dispatchEvent(new window.KeyboardEvent("keydown", { key: "Enter", bubbles: true, cancelable: true }));
  found.open = [...page.querySelectorAll("details.recipe[open]")].map((details) => details.id);
  found.recipe = page.querySelector("details.recipe[open] pre").checkVisibility();
  return found;
}

addEventListener("load", () => {
  const results = {};
  for (const frame of document.querySelectorAll("iframe")) {
    results[frame.id] = probe(frame);
    if (frame.dataset.use) results[frame.id].use = use(frame);
    results[frame.id].problems = frame.contentWindow.problems;
  }
  document.body.textContent = JSON.stringify(results);
});
