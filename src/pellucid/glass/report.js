"use strict";
/* Comforts only: sorting tables, choosing what the attention maps show, opening everything for print.
   Without this script the whole report can be read. */

function sortable(table) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const given = [...body.rows];
  const value = (row, column) => {
    const cell = row.cells[column];
    return cell.dataset.key === undefined ? cell.textContent.trim() : Number(cell.dataset.key);
  };
  const order = (column, down) => (a, b) => {
    const x = value(a, column);
    const y = value(b, column);
    if (typeof x !== typeof y) return typeof x === "number" ? -1 : 1; /* what was not measured comes last */
    const sign = down ? -1 : 1;
    return sign * (typeof x === "number" ? x - y : x.localeCompare(y, undefined, { numeric: true }));
  };
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const state = { none: "ascending", ascending: "descending", descending: "none" };
      const next = state[head.getAttribute("aria-sort") || "none"];
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      if (next !== "none") head.setAttribute("aria-sort", next);
      const rows = next === "none" ? given : [...given].sort(order(column, next === "descending"));
      body.append(...rows);
    });
  });
}

function choice(name, options, chosen, change) {
  const label = document.createElement("label");
  const select = document.createElement("select");
  options.forEach(([text, value]) => select.add(new Option(text, value, value === chosen, value === chosen)));
  select.addEventListener("change", () => change(select.value));
  label.append(name + " ", select);
  return label;
}

function chooser(block) {
  const layers = [...block.querySelectorAll("details.layer")];
  const bar = document.createElement("p");
  bar.className = "chooser";
  const open = layers.find((layer) => layer.open) || layers[layers.length - 1];
  const show = (number) => layers.forEach((layer) => { layer.open = layer.dataset.layer === number; });
  const byLayer = choice("Layer", layers.map((l) => [l.dataset.layer, l.dataset.layer]), open.dataset.layer, show);

  const tables = layers.map((layer) => layer.querySelector("table"));
  const heads = Math.max(...tables.map((table) => table.tHead.rows[0].cells.length - 1));
  const images = Math.max(...tables.map((table) => table.tBodies[0].rows.length));
  const numbers = (n, name) => [["all", "all"], ...Array.from({ length: n }, (_, i) => [`${name} ${i + 1}`, String(i + 1)])];
  const oneHead = (value) => tables.forEach((table) => {
    table.classList.toggle("single", value !== "all");
    [...table.rows].forEach((row) => [...row.cells].forEach((cell, k) =>
      cell.classList.toggle("off", k > 0 && value !== "all" && k !== Number(value))));
  });
  const oneImage = (value) => tables.forEach((table) => [...table.tBodies[0].rows].forEach((row, i) =>
    row.classList.toggle("off", value !== "all" && i !== Number(value) - 1)));
  bar.append(byLayer);
  if (heads > 1) bar.append(choice("Head", numbers(heads, "head"), "all", oneHead));
  if (images > 1) bar.append(choice("Image", numbers(images, "image"), "all", oneImage));
  block.prepend(bar);
  block.classList.add("chosen");
  layers.forEach((layer) => layer.querySelector("summary").addEventListener("click", (event) => event.preventDefault()));
  block.querySelectorAll("img").forEach((map) => { map.title = map.alt; });
}

document.querySelectorAll("table.sortable").forEach(sortable);
document.querySelectorAll("div.attention").forEach(chooser);

let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not([open])")];
  opened.forEach((details) => { details.open = true; });
});
addEventListener("afterprint", () => opened.forEach((details) => { details.open = false; }));
