"use strict";

// Everything on the page that needs a script: the theme, sorting, and the table of wrong
// predictions, of whose rows only those in view are in the document.

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children); // text nodes: what data hold is never read as markup
  return made;
}

const number = new Intl.NumberFormat("en");

// Theme ------------------------------------------------------------------------------------------

function remembered(value) {
  try { // a page opened from a file may have no storage
    if (value) localStorage.setItem("theme", value);
    return localStorage.getItem("theme");
  } catch { return null; }
}

function setUpTheme() {
  const button = document.querySelector(".theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (document.documentElement.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";
  const show = () => { button.textContent = dark() ? "Light theme" : "Dark theme"; };
  const stored = remembered();
  if (stored) document.documentElement.dataset.theme = stored;
  button.addEventListener("click", () => {
    document.documentElement.dataset.theme = dark() ? "light" : "dark";
    remembered(document.documentElement.dataset.theme);
    show();
  });
  system.addEventListener("change", show);
  button.hidden = false;
  show();
}

// Sorting of the plain tables --------------------------------------------------------------------

function nextDirection(header, numeric) {
  const now = header.getAttribute("aria-sort");
  if (!now) return numeric ? "descending" : "ascending";
  return now === "ascending" ? "descending" : "ascending";
}

function mark(headers, chosen, direction) {
  for (const header of headers) header.removeAttribute("aria-sort");
  chosen.setAttribute("aria-sort", direction);
}

function sortTable(table, column, header, headers) {
  const body = table.tBodies[0];
  const numeric = header.classList.contains("number");
  const direction = nextDirection(header, numeric);
  const sign = direction === "ascending" ? 1 : -1;
  const rows = [...body.rows].map((row) => {
    const cell = row.cells[column];
    return { row, key: numeric ? Number(cell.dataset.key ?? NaN) : cell.textContent };
  });
  const compare = numeric
    ? (a, b) => Number.isNaN(a.key) - Number.isNaN(b.key) || sign * (a.key - b.key) || 0
    : (a, b) => sign * a.key.localeCompare(b.key, "zh-Hans");
  body.append(...rows.sort(compare).map((one) => one.row));
  mark(headers, header, direction);
}

function setUpSorting() {
  for (const table of document.querySelectorAll("table[data-sortable]")) {
    const headers = [...table.tHead.rows[0].cells];
    headers.forEach((header, column) => {
      const button = element("button", { type: "button" }, ...header.childNodes);
      button.addEventListener("click", () => sortTable(table, column, header, headers));
      header.append(button);
    });
  }
}

// Wrong predictions ------------------------------------------------------------------------------

const HEIGHT = 34; // of a row, as in the style
const SPARE = 8; // rows above and below those in view

class Explorer {
  constructor(root, groups) {
    this.form = root.querySelector("form");
    this.count = root.querySelector("output");
    this.grid = root.querySelector(".grid");
    this.head = root.querySelector(".grid-head");
    this.body = root.querySelector(".grid-body");
    this.detail = root.querySelector(".detail");
    this.choices = groups.flatMap((group) => group.runs.map((run) => ({ group, run })));
    this.chosen = -1; // place in `rows`
    this.rows = []; // places in the run's lists, filtered and sorted
    root.hidden = false;
    this.fillRuns(groups.length > 1);
    this.form.addEventListener("submit", (event) => event.preventDefault());
    this.form.run.addEventListener("change", () => this.open());
    for (const name of ["gold", "predicted"]) this.form[name].addEventListener("change", () => this.filter());
    this.form.text.addEventListener("input", () => this.filter());
    this.grid.addEventListener("scroll", () => this.draw(), { passive: true });
    this.grid.addEventListener("keydown", (event) => this.key(event));
    this.body.addEventListener("click", (event) => {
      const row = event.target.closest("[data-place]");
      if (row) this.choose(Number(row.dataset.place));
    });
    new ResizeObserver(() => this.draw()).observe(this.grid);
    this.open();
  }

  fillRuns(withSplit) {
    this.choices.forEach(({ group, run }, place) => {
      const name = withSplit ? `${run.name}, ${group.split}` : run.name;
      this.form.run.append(element("option", { value: place }, name));
    });
  }

  open() {
    const { group, run } = this.choices[Number(this.form.run.value)];
    this.group = group;
    this.run = run;
    this.names = [...group.labels, "unmatched"];
    const named = (label) => this.names[label < 0 ? this.names.length - 1 : label];
    this.named = named;
    for (const name of ["gold", "predicted"]) {
      const options = group.labels.map((label, place) => element("option", { value: place }, label));
      if (name === "predicted") options.push(element("option", { value: -1 }, "unmatched"));
      this.form[name].replaceChildren(element("option", { value: "" }, "any"), ...options);
    }
    const gold = (row) => group.gold[run.rows[row]];
    this.columns = [
      { title: "text", key: (row) => group.texts[run.rows[row]], show: (row) => group.texts[run.rows[row]], lang: true },
      { title: "gold", key: gold, show: (row) => this.goldText(row), lang: true },
      { title: "predicted", key: (row) => run.predicted[row], show: (row) => named(run.predicted[row]), lang: true },
    ];
    if (run.top) {
      const own = (row) => (run.predicted[row] < 0 ? NaN : run.own[row]);
      const margin = (row) => own(row) - run.gold[row];
      const fraction = (value) => (Number.isNaN(value) ? "–" : (value / 1e4).toFixed(3));
      this.columns.push(
        { title: "p predicted", number: true, key: own, show: (row) => fraction(own(row)) },
        { title: "p gold", number: true, key: (row) => run.gold[row], show: (row) => fraction(run.gold[row]) },
        { title: "margin", number: true, key: margin, show: (row) => fraction(margin(row)) },
        { title: "scores", lang: true, show: (row) => this.best(row).map(([label, p]) => `${named(label)} ${(p / 1e4).toFixed(2)}`).join("  ") },
      );
    }
    this.sorting = run.top ? { column: 5, direction: "descending" } : { column: 0, direction: "ascending" };
    this.drawHead();
    this.filter();
  }

  goldText(row) {
    const shares = this.group.shares[this.run.rows[row]];
    if (!shares) return this.named(this.group.gold[this.run.rows[row]]);
    return pairs(shares).slice(0, 3).map(([label, share]) => `${this.named(label)} ${(share / 1e4).toFixed(2)}`).join("  ");
  }

  best(row) {
    const { top, width } = this.run;
    return pairs(top.slice(2 * width * row, 2 * width * (row + 1)));
  }

  drawHead() {
    const headers = this.columns.map((column, place) => {
      if (!column.key) return element("div", { role: "columnheader" }, column.title);
      const button = element("button", { type: "button" }, column.title);
      const header = element("div", { role: "columnheader", class: column.number ? "number" : "" }, button);
      button.addEventListener("click", () => {
        const direction = nextDirection(header, column.number);
        this.sorting = { column: place, direction };
        mark(headers, header, direction);
        this.sort();
      });
      return header;
    });
    mark(headers, headers[this.sorting.column], this.sorting.direction);
    this.head.replaceChildren(...headers);
    this.grid.setAttribute("aria-colcount", this.columns.length);
  }

  filter() {
    const { run, group } = this;
    const gold = this.form.gold.value, predicted = this.form.predicted.value;
    const wanted = this.form.text.value.trim().toLowerCase();
    const rows = [];
    for (let row = 0; row < run.rows.length; row++) {
      const example = run.rows[row];
      if (gold !== "" && group.gold[example] !== Number(gold)) continue;
      if (predicted !== "" && run.predicted[row] !== Number(predicted)) continue;
      if (wanted && !group.texts[example].toLowerCase().includes(wanted)) continue;
      rows.push(row);
    }
    this.rows = rows;
    this.count.textContent = `${number.format(rows.length)} of ${number.format(run.rows.length)} wrong, ` +
      `${number.format(group.n)} examples`;
    this.sort();
  }

  sort() {
    const { key } = this.columns[this.sorting.column];
    const sign = this.sorting.direction === "ascending" ? 1 : -1;
    const keys = new Map(this.rows.map((row) => [row, key(row)]));
    this.rows.sort((a, b) => {
      const x = keys.get(a), y = keys.get(b);
      if (x === y) return a - b;
      if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
      return x < y ? -sign : sign;
    });
    this.body.style.height = `${this.rows.length * HEIGHT}px`;
    this.grid.setAttribute("aria-rowcount", this.rows.length + 1);
    this.grid.scrollTop = 0;
    this.choose(this.rows.length ? 0 : -1);
  }

  draw() {
    const from = Math.max(0, Math.floor(this.grid.scrollTop / HEIGHT) - SPARE);
    const to = Math.min(this.rows.length, Math.ceil((this.grid.scrollTop + this.grid.clientHeight) / HEIGHT) + SPARE);
    const made = [];
    for (let place = from; place < to; place++) {
      const cells = this.columns.map((column) => {
        const attributes = { role: "gridcell", class: column.number ? "number" : "" };
        if (column.lang) attributes.lang = "zh-Hans";
        return element("div", attributes, column.show(this.rows[place]));
      });
      const row = element("div", {
        role: "row", class: "grid-row", id: `error-${place}`, "data-place": place,
        "aria-rowindex": place + 2, "aria-selected": place === this.chosen,
      }, ...cells);
      row.style.top = `${place * HEIGHT}px`;
      made.push(row);
    }
    this.body.replaceChildren(...made);
  }

  choose(place) {
    this.chosen = place;
    if (place >= 0) {
      const top = place * HEIGHT, room = this.grid.clientHeight - HEIGHT; // less the header
      if (top < this.grid.scrollTop) this.grid.scrollTop = top;
      if (top + HEIGHT > this.grid.scrollTop + room) this.grid.scrollTop = top + HEIGHT - room;
      this.grid.setAttribute("aria-activedescendant", `error-${place}`);
    } else {
      this.grid.removeAttribute("aria-activedescendant");
    }
    this.draw();
    this.drawDetail();
  }

  key(event) {
    if (event.target !== this.grid || !this.rows.length) return;
    const page = Math.max(1, Math.floor(this.grid.clientHeight / HEIGHT) - 2);
    const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
    if (!(event.key in steps)) return;
    event.preventDefault();
    this.choose(Math.min(this.rows.length - 1, Math.max(0, this.chosen + steps[event.key])));
  }

  drawDetail() {
    if (this.chosen < 0) return this.detail.replaceChildren();
    const row = this.rows[this.chosen], example = this.run.rows[row];
    const shares = this.group.shares[example] || [this.group.gold[example], 1e4];
    const parts = [
      element("div", { class: "chat", lang: "zh-Hans" }, this.group.texts[example]),
      this.listing("Gold", pairs(shares)),
    ];
    if (this.run.top) parts.push(this.listing("Scores", this.best(row)));
    else parts.push(element("div", {}, element("h4", {}, "Predicted"), this.named(this.run.predicted[row])));
    this.detail.replaceChildren(...parts);
  }

  listing(title, values) {
    const lines = values.flatMap(([label, share]) => {
      const fill = element("i");
      fill.style.width = `${share / 100}%`;
      return [
        element("dt", { lang: "zh-Hans" }, this.named(label)),
        element("dd", { class: "bar", "aria-hidden": "true" }, fill),
        element("dd", {}, (share / 1e4).toFixed(3)),
      ];
    });
    return element("div", {}, element("h4", {}, title), element("dl", {}, ...lines));
  }
}

function pairs(flat) {
  const found = [];
  for (let place = 0; place < flat.length; place += 2) found.push([flat[place], flat[place + 1]]);
  return found;
}

setUpTheme();
setUpSorting();
const data = JSON.parse(document.getElementById("data").textContent);
document.querySelectorAll(".explorer").forEach((root, place) => new Explorer(root, data[place]));
