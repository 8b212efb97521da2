// Shows `preset` first on Train SDXL LoRA. Among the inputs it is declared last, because saved workflows list the values
// of widgets by their positions.
import { app } from "../../scripts/app.js";

const FIRST = "preset";

function withDeclaredOrder(node, method) {
  const original = node[method];
  node[method] = function () {
    const first = this.widgets.find((widget) => widget.name === FIRST);
    if (first) place(this, first, this.declaredAt);
    try {
      return original.apply(this, arguments);
    } finally {
      if (first) place(this, first, 0);
    }
  };
}

function place(node, widget, position) {
  node.widgets.splice(node.widgets.indexOf(widget), 1);
  node.widgets.splice(position, 0, widget);
}

app.registerExtension({
  name: "sdxlloranodes.preset",
  nodeCreated(node) {
    if (node.comfyClass !== "TrainSDXLLoRA") return;
    const widget = node.widgets?.find((one) => one.name === FIRST);
    if (!widget) return;
    node.declaredAt = node.widgets.indexOf(widget);
    place(node, widget, 0);
    for (const method of ["configure", "serialize"]) withDeclaredOrder(node, method);
  },
});
