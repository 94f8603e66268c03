// The cell under the pointer, finger or arrow keys: outlined in every map of the same matrices, named below them.
"use strict";
const numbers = JSON.parse(document.getElementById("numbers").textContent);

function nameOf(grid, row, column) {
  const many = grid.templates.length === grid.rows && grid.columns === grid.layers.length && grid.templates[0].indexOf("*") < 0;
  const template = many ? grid.templates[row] : grid.templates[0];
  const name = template.replace("{}", grid.layers[many ? column : row]);
  return many ? name : name.includes("*") ? name.replace("*", column) : `${name}[${column}]`;
}

function show(map, row, column) {
  const key = map.dataset.map, grid = numbers[key], at = row * grid.columns + column;
  if (grid.rank[at] === null) return;
  const name = nameOf(grid, row, column);
  const error = grid.error[at] === null ? "unknown" : grid.error[at].toFixed(4);
  const section = map.closest("section");
  for (const other of section.querySelectorAll(".map")) {
    const cursor = other.querySelector(".cursor");
    if (other.dataset.map !== key) { cursor.setAttribute("width", 0); continue; }
    const [x, y, width, height] = other.dataset.box.split(" ").map(Number);
    const cell = width / grid.columns, line = height / grid.rows;
    cursor.setAttribute("x", x + column * cell);
    cursor.setAttribute("y", y + row * line);
    cursor.setAttribute("width", cell);
    cursor.setAttribute("height", line);
    cursor.firstElementChild.textContent = `${name}: error ${error}, rank ${grid.rank[at]}`;
  }
  map.dataset.row = row;
  map.dataset.column = column;
  const number = document.createElement("b");
  number.textContent = `error ${error} · rank ${grid.rank[at]}`;
  section.querySelector(".readout").replaceChildren(number, ` · ${name}`);
}

function point(map, event) {
  const grid = numbers[map.dataset.map], [x, y, width, height] = map.dataset.box.split(" ").map(Number);
  const corner = map.querySelector("svg").getBoundingClientRect();
  const column = Math.floor((event.clientX - corner.left - x) / width * grid.columns);
  const row = Math.floor((event.clientY - corner.top - y) / height * grid.rows);
  if (column >= 0 && row >= 0 && column < grid.columns && row < grid.rows) show(map, row, column);
}

const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
function step(map, event) {
  const move = steps[event.key], grid = numbers[map.dataset.map];
  if (!move) return;
  event.preventDefault();
  const clamp = (value, count) => Math.min(Math.max(value, 0), count - 1);
  show(map, clamp(+(map.dataset.row ?? 0) + move[0], grid.rows), clamp(+(map.dataset.column ?? -1) + move[1], grid.columns));
}

for (const map of document.querySelectorAll(".map")) {
  map.addEventListener("pointermove", (event) => point(map, event));
  map.addEventListener("pointerdown", (event) => point(map, event));
  map.addEventListener("keydown", (event) => step(map, event));
}
for (const readout of document.querySelectorAll(".readout")) readout.textContent = "Point at a cell, or step through with the arrow keys.";
