// The results of evaluating nodes as a table, which a click on a column sorts.
import { app } from "../../scripts/app.js";
import { addPanel, element } from "./panel.js";
import { say } from "./words.js";

const PANEL = "sdxl_lora_table";

function showTable(node, { columns, rows }) {
  const table = element("table");
  let [column, sign] = [null, 1];
  const sortBy = (name) => {
    const numbers = rows.some((row) => typeof row[name] === "number");
    sign = name === column ? -sign : numbers ? -1 : 1; // the best scores first
    column = name;
    fill();
  };
  const fill = () => {
    const head = columns.map(([name, title]) => element("th", { textContent: title, onclick: () => sortBy(name) }));
    const sorted = column === null ? rows : [...rows].sort((a, b) => sign * compare(a[column], b[column]));
    const body = sorted.map((row) => tableRow(row, columns));
    table.replaceChildren(element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...body));
  };
  fill();
  const root = element("div", { className: "sdxl-lora-table" }, table);
  root.dataset.scrolls = "";
  addPanel(node, PANEL, root, { minHeight: Math.min(180, 30 + 22 * rows.length) });
}

function tableRow(row, columns) {
  const cells = columns.map(([name, , digits]) => element("td", { textContent: written(row[name], digits) }));
  return element("tr", { title: row.prompt ?? "" }, ...cells);
}

function written(value, digits) {
  if (value === undefined) return "";
  if (value === null) return say("none");
  return typeof value === "number" && digits !== null ? value.toFixed(digits) : String(value);
}

function compare(a, b) {
  return typeof a === "string" ? a.localeCompare(b) : (a ?? -Infinity) - (b ?? -Infinity);
}

app.registerExtension({
  name: "sdxlloranodes.table",
  nodeCreated(node) {
    const { onExecuted } = node;
    node.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      if (output?.sdxl_lora_table) showTable(this, output.sdxl_lora_table[0]);
    };
  },
});
