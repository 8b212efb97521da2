// The scores on CLIP Score as a table, which a click on a column sorts.
import { app } from "../../scripts/app.js";
import { addPanel, element } from "./panel.js";

const PANEL = "sdxl_lora_scores";
const COLUMNS = [["rank", "#"], ["image", "image"], ["clip_score", "CLIP"], ["prompt", "prompt"]];

function showScores(node, rows) {
  const table = element("table");
  let [column, sign] = ["rank", 1];
  const sortBy = (name) => {
    sign = name === column ? -sign : 1;
    column = name;
    fill();
  };
  const fill = () => {
    const head = COLUMNS.map(([name, title]) => element("th", { textContent: title, onclick: () => sortBy(name) }));
    const sorted = [...rows].sort((a, b) => sign * compare(a[column], b[column]));
    table.replaceChildren(element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...sorted.map(row)));
  };
  fill();
  const root = element("div", { className: "sdxl-lora-table" }, table);
  root.dataset.scrolls = "";
  addPanel(node, PANEL, root, { minHeight: Math.min(180, 30 + 22 * rows.length) });
}

function row({ rank, image, clip_score: score, prompt }) {
  const texts = [rank, image + 1, score === null ? "none" : score.toFixed(2), prompt];
  return element("tr", { title: prompt }, ...texts.map((text) => element("td", { textContent: String(text) })));
}

function compare(a, b) {
  return typeof a === "string" ? a.localeCompare(b) : (a ?? -Infinity) - (b ?? -Infinity);
}

app.registerExtension({
  name: "sdxl_lora.scores",
  nodeCreated(node) {
    if (node.comfyClass !== "CLIPScore") return;
    const { onExecuted } = node;
    node.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      if (output?.sdxl_lora_scores) showScores(this, output.sdxl_lora_scores);
    };
  },
});
