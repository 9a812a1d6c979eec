"use strict";
// Search, metric choice and sorting of the table. Without scripts the page shows all of it.
(() => {
  const rows = [...document.querySelectorAll("#scores tbody tr")];
  const body = document.querySelector("#scores tbody");
  const search = document.querySelector("#search");
  const metric = document.querySelector("#metric");
  const count = document.querySelector("#count");
  document.documentElement.classList.add("js");
  document.querySelector(".tools").hidden = false;
  metric.hidden = metric.options.length < 2;
  const show = () => {
    const words = search.value.trim().toLowerCase();
    let shown = 0;
    for (const row of rows) {
      const fits = row.dataset.metric === metric.value && row.dataset.name.includes(words);
      row.hidden = !fits;
      shown += fits;
    }
    for (const part of document.querySelectorAll("section[data-metric]")) {
      part.hidden = part.dataset.metric !== metric.value;
    }
    count.textContent = `${shown} shown`;
  };
  search.addEventListener("input", show);
  metric.addEventListener("change", show);
  document.querySelectorAll("#scores th").forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      // Names start from A, numbers from the largest.
      const sorted = head.getAttribute("aria-sort");
      const down = sorted ? sorted === "descending" : column === 0;
      document.querySelectorAll("#scores th").forEach((other) => other.removeAttribute("aria-sort"));
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
})();
