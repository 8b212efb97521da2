// On SDXL Generate (cached): which images came from the cache, and how long the others took.
import { app } from "../../scripts/app.js";
import { addPanel, element } from "./panel.js";

const PANEL = "sdxl_lora_badges";
const ROW = 22; // pixels
const IN_A_ROW = 4;

function showBadges(node, images) {
  const badges = images.map(({ from_cache: hit, seconds, seed }, index) =>
    element("span", {
      className: hit ? "sdxl-lora-hit" : "sdxl-lora-made",
      title: `seed ${seed}`,
      textContent: `${index + 1} ${hit ? "cache" : `made ${seconds.toFixed(1)} s`}`,
    }),
  );
  const root = element("div", { className: "sdxl-lora-badges" }, ...badges);
  root.dataset.scrolls = "";
  addPanel(node, PANEL, root, { minHeight: 8 + ROW * Math.min(3, Math.ceil(images.length / IN_A_ROW)) });
}

app.registerExtension({
  name: "sdxl_lora.badges",
  nodeCreated(node) {
    if (node.comfyClass !== "SDXLGenerateCached") return;
    const { onExecuted } = node;
    node.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      if (output?.sdxl_lora_made) showBadges(this, output.sdxl_lora_made);
    };
  },
});
