// The way to the voting page on Human Compare, and how many votes there are.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { addPanel, allNodes, element, findPanel } from "./panel.js";
import { onStatus } from "./status.js";
import { say } from "./words.js";

const NODE = "HumanCompare";
const PANEL = "sdxl_lora_vote";

function showVote(node, name) {
  const path = `/sdxl_lora/vote/${encodeURIComponent(name)}`;
  if (node.sdxlLoRAVote === name && findPanel(node, PANEL)) return showCount(node);
  node.sdxlLoRAVote = name;
  const open = element("button", { textContent: say("Open the voting page"), title: api.apiURL(path) });
  open.onclick = () => window.open(api.apiURL(path), "_blank", "noopener");
  const words = element("div", { className: "sdxl-lora-votes" });
  addPanel(node, PANEL, element("div", { className: "sdxl-lora-vote" }, open, words), { minHeight: 70 });
  showCount(node);
}

async function showCount(node) {
  const words = findPanel(node, PANEL)?.element.querySelector(".sdxl-lora-votes");
  if (!words) return;
  const response = await api.fetchApi(`/sdxl_lora/vote/${encodeURIComponent(node.sdxlLoRAVote)}/ranking`);
  const answer = await response.json();
  words.textContent = answer.error ?? answer.sentences[0];
}

app.registerExtension({
  name: "sdxlloranodes.vote",
  setup() {
    onStatus((node, status) => {
      if (node.comfyClass === NODE && status.run) showVote(node, status.run);
    });
    addEventListener("focus", () => { // back from the voting page
      for (const node of allNodes(app.rootGraph ?? app.graph)) if (node.comfyClass === NODE) showCount(node);
    });
  },
  nodeCreated(node) {
    if (node.comfyClass !== NODE) return;
    const { onExecuted } = node;
    node.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      if (output?.sdxl_lora_vote) showVote(this, output.sdxl_lora_vote[0].name);
    };
  },
});
