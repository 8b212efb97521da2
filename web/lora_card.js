// The card of the chosen file on Load LoRA: picture, trigger words, base and rank, before anything has run.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { addPanel, allNodes, element, removePanel } from "./panel.js";
import { say } from "./words.js";

const NODE = "LoadLoRA";
const PANEL = "sdxl_lora_card";
const INCOMING = "(incoming)";

const widgetOf = (node) => node.widgets?.find((widget) => widget.name === "lora_name");

async function showChosen(node) {
  const name = widgetOf(node)?.value;
  if (!name || name === INCOMING) return removePanel(node, PANEL);
  const listed = widgetOf(node).options?.values;
  if (Array.isArray(listed) && !listed.includes(name))
    return showCard(node, { error: say("{name} is not in the list of LoRAs. Press R on the canvas to read the folder again.", { name }) }, "");
  const query = new URLSearchParams({ name });
  const response = await api.fetchApi(`/sdxl_lora/lora?${query}`);
  if (widgetOf(node)?.value !== name) return; // another was chosen meanwhile
  const card = await response.json();
  showCard(node, card, card.picture ? api.apiURL(`/sdxl_lora/lora_picture?${query}`) : "");
}

function showCard(node, card, picture) {
  const body = element("div", { className: "sdxl-lora-body" }, words(card.trigger_words ?? []));
  const lines = card.error ? [card.error] : card.lines.filter((line) => !line.startsWith("trigger words:"));
  body.append(...lines.map((textContent) => element("div", { textContent })));
  const root = element("div", { className: "sdxl-lora-card" });
  if (picture) root.append(element("img", { src: picture, alt: card.name }));
  root.append(body);
  root.dataset.scrolls = "";
  removePanel(node, "sdxl_lora_text"); // which says the same
  addPanel(node, PANEL, root, { minHeight: picture ? 130 : 96 });
}

function words(triggers) {
  const copy = (word, button) => async () => {
    await navigator.clipboard?.writeText(word);
    button.dataset.copied = "yes";
    setTimeout(() => delete button.dataset.copied, 1000);
  };
  return element("div", { className: "sdxl-lora-words" }, ...triggers.map((word) => {
    const button = element("button", { textContent: word, title: say("Copy this trigger word") });
    button.onclick = copy(word, button);
    return button;
  }));
}

app.registerExtension({
  name: "sdxlloranodes.card",
  nodeCreated(node) {
    if (node.comfyClass !== NODE) return;
    const widget = widgetOf(node);
    const { callback } = widget ?? {};
    if (widget)
      widget.callback = function () {
        callback?.apply(this, arguments);
        showChosen(node);
      };
    setTimeout(() => showChosen(node), 0); // of a node that is added, by its default
  },
  afterConfigureGraph() {
    for (const node of allNodes(app.rootGraph ?? app.graph)) if (node.comfyClass === NODE) showChosen(node);
  },
});
