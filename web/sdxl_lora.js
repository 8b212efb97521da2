// Hides advanced inputs on frontends that know them only as a widget option (ComfyUI 0.3.64), and shows the text of a
// node below its widgets.
import { app } from "../../scripts/app.js";

const CATEGORY = "SDXL LoRA"; // of all nodes of this pack and no others
const ROW = 20; // LiteGraph.NODE_WIDGET_HEIGHT; the layout adds 4

function hideAdvanced(node) {
  for (const widget of node.widgets ?? []) {
    if (!widget.options?.advanced || widget.advanced) continue;
    widget.advanced = true;
    // These frontends reserve room for hidden widgets.
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
    widget.serialize = false; // not saved with the workflow
    node.setSize?.([node.size[0], Math.max(node.size[1], node.computeSize()[1])]);
  }
  widget.element.value = lines.join("\n");
}

// When a node has finished, its results are shown. ComfyUI would keep showing the last preview and numbers of the run.
function dropProgress(node) {
  for (const id of [node.id, `${node.graph?.id}:${node.id}`]) delete app.nodePreviewImages?.[id];
  const text = node.widgets?.find((widget) => widget.name === "$$node-text-preview");
  if (!text) return;
  text.onRemove?.();
  node.widgets.splice(node.widgets.indexOf(text), 1);
}

// Previews fill the node down to its lower edge, so later widgets would cover them.
function putPreviewLast(node) {
  const at = node.widgets?.findIndex((widget) => widget.name === "$$canvas-image-preview") ?? -1;
  if (at >= 0 && at < node.widgets.length - 1) node.widgets.push(...node.widgets.splice(at, 1));
}

// ComfyUI shows the text of a running node in a widget and saves that widget's value; only inputs should be saved.
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
      putPreviewLast(this);
    };
    node.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      dropProgress(this);
      if (output?.text) showText(this, output.text);
    };
  },
});
