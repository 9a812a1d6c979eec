"use strict";
// Search, sorting, choice of metric, and one perturbation in focus. Without scripts the page shows all of it.
(() => {
  const all = (selector) => [...document.querySelectorAll(selector)];
  const one = (selector) => document.querySelector(selector);
  document.documentElement.classList.add("js");
  for (const tools of all(".tools")) tools.hidden = false;

  // The table.
  const rows = all("#scores tbody tr");
  const body = one("#scores tbody");
  const search = one("#search");
  const metric = one("#metric");
  metric.hidden = metric.options.length < 2;
  const show = () => {
    const words = search.value.trim().toLowerCase();
    let shown = 0;
    for (const row of rows) {
      const fits = row.dataset.metric === metric.value && row.dataset.name.toLowerCase().includes(words);
      row.hidden = !fits;
      shown += fits;
    }
    for (const part of all("section[data-metric]")) part.hidden = part.dataset.metric !== metric.value;
    one("#count").textContent = `${shown} shown`;
  };
  search.addEventListener("input", show);
  metric.addEventListener("change", show);
  all("#scores th").forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      // Names start from A, numbers from the largest.
      const sorted = head.getAttribute("aria-sort");
      const down = sorted ? sorted === "descending" : column === 0;
      for (const other of all("#scores th")) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "ascending" : "descending");
      const sign = down ? 1 : -1;
      const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
      rows.sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        const [u, v] = [Number(x), Number(y)];
        // Missing numbers stay last, whichever way the column is sorted.
        if (x === "" || y === "") return (x === "") - (y === "");
        return sign * (Number.isNaN(u) || Number.isNaN(v) ? x.localeCompare(y) : u - v);
      });
      body.append(...rows);
    });
  });
  show();

  // One perturbation in focus, in the table, the charts and the map alike.
  const chooser = one("#focus");
  const map = one(".map");
  const keys = one("#keys");
  const strongest = keys && [...keys.children];
  let chosen = "";
  const focus = (name) => {
    chosen = name;
    for (const item of all("[data-name]")) item.classList.toggle("focus", name !== "" && item.dataset.name === name);
    if (!map) return;
    const cells = [...map.querySelectorAll(".cells")].find((item) => name !== "" && item.dataset.name === name);
    map.classList.toggle("one", Boolean(cells));
    chooser.value = cells ? name : "";
    keys.replaceChildren(...strongest);
    if (!cells) return;
    map.append(cells); // above the others
    const key = document.createElement("span");
    const dot = document.createElement("i");
    key.className = "key";
    dot.className = "c1";
    key.append(dot, name);
    keys.replaceChildren(strongest[0], key);
  };
  if (chooser) chooser.addEventListener("change", () => focus(chooser.value));
  for (const item of [...rows, ...all(".points [data-name]")]) {
    item.addEventListener("click", () => focus(item.dataset.name === chosen ? "" : item.dataset.name));
  }

  // The pair under the pointer.
  const grid = one(".heat .pick");
  if (grid) {
    const names = JSON.parse(grid.dataset.names);
    const values = JSON.parse(grid.dataset.values);
    const tell = (event) => {
      const box = grid.getBoundingClientRect();
      const at = (part) => Math.min(names.length - 1, Math.max(0, Math.floor(part * names.length)));
      const [i, j] = [at((event.clientY - box.top) / box.height), at((event.clientX - box.left) / box.width)];
      one("#pair").textContent = i === j ? names[i] : `${names[i]} and ${names[j]}: distance ${values[i][j]}`;
    };
    grid.addEventListener("pointermove", tell);
    grid.addEventListener("click", tell);
  }
})();
