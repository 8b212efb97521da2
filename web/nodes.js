// What all nodes of the pack have on the page: advanced inputs hidden, and the text of a result below the widgets.
import { app } from "../../scripts/app.js";
import { addPanel, allNodes, element, findPanel, removePanel } from "./panel.js";
import { onStatus } from "./status.js";
import { say } from "./words.js";

const CATEGORY = "SDXL LoRA"; // of all nodes of this pack and no others
const COLORS = ["#2c4a52", "#22373d"]; // of title and body
const TEXT = "sdxl_lora_text";
const ROW = 20; // LiteGraph.NODE_WIDGET_HEIGHT; the layout adds 4
const WIDTH = 320; // of a new node, in pixels: names and values are not cut

export function isOurs(node) {
  return node.constructor.nodeData?.category?.split("/")[0] === CATEGORY;
}

// Nodes 2.0 hides advanced inputs by itself. On the canvas they are hidden once `advanced` is assigned, and then still
// take the room of a row.
function hideAdvanced(node) {
  for (const widget of node.widgets ?? []) {
    if (!widget.options?.advanced) continue;
    widget.advanced = true;
    widget.computeSize = (width) => [width ?? 0, node.showAdvanced ? ROW : -4];
  }
  const [width, height] = node.computeSize();
  node.setSize?.([Math.max(width, WIDTH), height]);
}

// Pairs of images are compared at the same seed. A workflow that has saved another choice replaces this one.
function keepSeed(node) {
  const control = node.widgets?.find((widget) => widget.name === "control_after_generate");
  if (control) control.value = "fixed";
}

export function showText(node, text, failed = false) {
  const panel = findPanel(node, TEXT);
  const area = panel?.element.firstChild ?? element("textarea", { className: "comfy-multiline-input", readOnly: true });
  area.dataset.scrolls = "";
  area.value = text;
  area.classList.toggle("sdxl-lora-failed", failed);
  if (!panel) addPanel(node, TEXT, area);
}

function progressLines({ state, phase, done, total, detail, message }) {
  if (state === "failed") return say("failed: {message}", { message });
  if (state === "cancelled") return [say("cancelled"), message].filter(Boolean).join("\n");
  const first = phase ? say("{phase}: {done} of {total}", { phase, done, total }) : say("starting");
  return [first, detail, message].filter(Boolean).join("\n");
}

// ComfyUI would keep showing the last preview beside the results.
function dropPreview(node) {
  const ids = [`${node.graph?.id}:${node.id}`, String(node.id)];
  for (const id of ids) {
    previews()?.revokePreviewsByLocatorId?.(id);
    delete app.nodePreviewImages?.[id];
  }
  app.revokePreviews?.(node.id);
  // The canvas may have taken up the results while the preview was still there: this makes it look again.
  node.preview = undefined;
  node.images = undefined;
}

// Newer pages keep previews in a store of their own as well, which has no way in for extensions.
function previews() {
  return document.getElementById("vue-app")?.__vue_app__?.config.globalProperties.$pinia?._s.get("nodeOutput");
}

// Previews fill the node down to its lower edge, so later widgets would cover them.
function putPreviewLast(node) {
  const at = node.widgets?.findIndex((widget) => widget.name === "$$canvas-image-preview") ?? -1;
  if (at >= 0 && at < node.widgets.length - 1) node.widgets.push(...node.widgets.splice(at, 1));
}

/** Without an element in the page's document, which belongs to all packs. */
async function addStyles() {
  const response = await fetch(new URL("./sdxl_lora.css", import.meta.url));
  const styles = await new CSSStyleSheet().replace(await response.text());
  document.adoptedStyleSheets.push(styles);
}

// The page keeps the results of the workflow that is left for another tab, but makes its nodes anew. ComfyUI 0.3.64 puts
// the results back only after the graph is there: so they are looked for with each drawing, as it does for pictures.
const shown = new WeakMap(); // by node

function showKept(node) {
  const kept = app.nodeOutputs?.[`${node.graph?.id}:${node.id}`] ?? app.nodeOutputs?.[node.id];
  if (kept && kept !== shown.get(node)) {
    shown.set(node, kept);
    node.onExecuted(kept);
  }
}

function showAllKept() {
  for (const node of allNodes(app.rootGraph ?? app.graph)) if (isOurs(node)) showKept(node);
}

app.registerExtension({
  name: "sdxlloranodes.nodes",
  setup() {
    addStyles();
    onStatus((node, status) => {
      if (!isOurs(node) || status.state === "done") return;
      if (node.comfyClass === "TrainSDXLLoRA") removePanel(node, TEXT); // of the last run: this one has a panel
      else showText(node, progressLines(status), status.state === "failed");
    });
  },
  nodeCreated(node) {
    if (!isOurs(node)) return;
    hideAdvanced(node);
    keepSeed(node);
    [node.color, node.bgcolor] = COLORS; // a colour that a workflow has saved replaces it
    const { onDrawBackground, onExecuted } = node;
    node.onDrawBackground = function () {
      onDrawBackground?.apply(this, arguments);
      putPreviewLast(this);
      showKept(this);
    };
    node.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      dropPreview(this);
      if (output?.text && !findPanel(this, "sdxl_lora_card")) showText(this, output.text.join("\n"));
    };
  },
  afterConfigureGraph() {
    // Nodes 2.0 draws without asking the node, and its page puts the results back a moment after the graph.
    for (const wait of [0, 300, 1000]) setTimeout(showAllKept, wait); // ms
  },
});
