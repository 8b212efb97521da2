// Hides advanced inputs on frontends that only note them in the widget's options (ComfyUI 0.3.64), and shows a node's
// text under its widgets.
import { app } from "../../scripts/app.js";

const CATEGORY = "SDXL LoRA"; // of all nodes of this pack, and of no others
const ROW = 20; // LiteGraph.NODE_WIDGET_HEIGHT; the layout adds 4

function hideAdvanced(node) {
  for (const widget of node.widgets ?? []) {
    if (!widget.options?.advanced || widget.advanced) continue;
    widget.advanced = true;
    // Those frontends leave room for hidden widgets, too.
    widget.computeSize = (width) => [width ?? 0, node.showAdvanced ? ROW : -4];
  }
  node.setSize?.(node.computeSize());
}

function showText(node, lines) {
  let widget = node.widgets?.find((candidate) => candidate.name === "sdxl_lora_text");
  if (!widget) {
    const area = document.createElement("textarea");
    area.className = "comfy-multiline-input";
    area.readOnly = true;
    widget = node.addDOMWidget("sdxl_lora_text", "text", area, { serialize: false, getMinHeight: () => 90 });
    widget.serialize = false; // keeps it out of the saved graph
    node.setSize?.([node.size[0], Math.max(node.size[1], node.computeSize()[1])]);
  }
  widget.element.value = lines.join("\n");
}

// Of a node that is done the results are shown. ComfyUI would go on showing the last picture and the last numbers of
// while it ran.
function dropProgress(node) {
  for (const id of [node.id, `${node.graph?.id}:${node.id}`]) delete app.nodePreviewImages?.[id];
  const text = node.widgets?.find((widget) => widget.name === "$$node-text-preview");
  if (!text) return;
  text.onRemove?.();
  node.widgets.splice(node.widgets.indexOf(text), 1);
}

// Pictures take the room down to the node's lower edge, so widgets that come later would cover them.
function putPicturesLast(node) {
  const at = node.widgets?.findIndex((widget) => widget.name === "$$canvas-image-preview") ?? -1;
  if (at >= 0 && at < node.widgets.length - 1) node.widgets.push(...node.widgets.splice(at, 1));
}

// ComfyUI shows a running node's text in a widget that it also saves; a saved graph holds the inputs' values alone.
function saveInputsOnly(node) {
  const own = node.widgets?.length ?? 0;
  const before = node.onSerialize;
  node.onSerialize = function (saved) {
    before?.apply(this, arguments);
    if (saved.widgets_values?.length > own) saved.widgets_values.length = own;
  };
}

app.registerExtension({
  name: "sdxl_lora.nodes",
  nodeCreated(node) {
    if (node.constructor.nodeData?.category?.split("/")[0] !== CATEGORY) return;
    hideAdvanced(node);
    saveInputsOnly(node);
    const { onDrawBackground, onExecuted } = node;
    node.onDrawBackground = function () {
      onDrawBackground?.apply(this, arguments);
      putPicturesLast(this);
    };
    node.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      dropProgress(this);
      if (output?.text) showText(this, output.text);
    };
  },
});
