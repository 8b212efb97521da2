// A button on the node while it trains: finish now and keep the LoRA.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const NAME = "Stop and keep";

function addButton(node) {
  const stop = () => {
    button.label = "Stopping after this step ...";
    api.fetchApi("/sdxl_lora/stop", { method: "POST" });
    node.setDirtyCanvas(true);
  };
  const button = node.addWidget("button", NAME, null, stop, { serialize: false });
  button.serialize = false; // not saved with the workflow
  node.setSize?.([node.size[0], Math.max(node.size[1], node.computeSize()[1])]);
}

function removeButton(node, button) {
  if (node.removeWidget) node.removeWidget(button);
  else node.widgets.splice(node.widgets.indexOf(button), 1);
}

function update(running) {
  for (const node of app.graph?._nodes ?? []) {
    if (node.comfyClass !== "TrainSDXLLoRA") continue;
    const button = node.widgets?.find((widget) => widget.name === NAME);
    const trains = String(node.id) === String(running);
    if (trains && !button) addButton(node);
    if (!trains && button) removeButton(node, button);
    node.setDirtyCanvas(true);
  }
}

app.registerExtension({
  name: "sdxl_lora.stop",
  setup() {
    api.addEventListener("executing", ({ detail }) => update(detail));
    for (const end of ["execution_success", "execution_error", "execution_interrupted"])
      api.addEventListener(end, () => update(null));
  },
});
