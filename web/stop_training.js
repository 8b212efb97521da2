// A button on a training node for as long as it trains: finish now and keep the LoRA.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const NAME = "Stop and keep";

function offerStop(node) {
  const stop = () => {
    button.label = "Stopping after this step ...";
    api.fetchApi("/sdxl_lora/stop", { method: "POST" });
    node.setDirtyCanvas(true);
  };
  const button = node.addWidget("button", NAME, null, stop, { serialize: false });
  button.serialize = false; // keeps it out of the saved graph
  node.setSize?.([node.size[0], Math.max(node.size[1], node.computeSize()[1])]);
}

function withdrawStop(node, button) {
  if (node.removeWidget) node.removeWidget(button);
  else node.widgets.splice(node.widgets.indexOf(button), 1);
}

function follow(running) {
  for (const node of app.graph?._nodes ?? []) {
    if (node.comfyClass !== "TrainSDXLLoRA") continue;
    const button = node.widgets?.find((widget) => widget.name === NAME);
    const trains = String(node.id) === String(running);
    if (trains && !button) offerStop(node);
    if (!trains && button) withdrawStop(node, button);
    node.setDirtyCanvas(true);
  }
}

app.registerExtension({
  name: "sdxl_lora.stop",
  setup() {
    api.addEventListener("executing", ({ detail }) => follow(detail));
    for (const end of ["execution_success", "execution_error", "execution_interrupted"])
      api.addEventListener(end, () => follow(null));
  },
});
