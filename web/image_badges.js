// On SDXL Generate (cached): which images came from the cache, and how long the others took.
import { app } from "../../scripts/app.js";
import { addPanel, element } from "./panel.js";
import { say } from "./words.js";

const PANEL = "sdxl_lora_badges";
const ROW = 22; // pixels
const IN_A_ROW = 4;

function showBadges(node, images) {
  const badges = images.map(({ from_cache: hit, seconds, seed }, index) =>
    element("span", {
      className: hit ? "sdxl-lora-hit" : "sdxl-lora-made",
      title: say("seed {seed}", { seed }),
      textContent: say(hit ? "{number} cache" : "{number} made {seconds} s", { number: index + 1, seconds: seconds.toFixed(1) }),
    }),
  );
  const root = element("div", { className: "sdxl-lora-badges" }, ...badges);
  root.dataset.scrolls = "";
  addPanel(node, PANEL, root, { minHeight: 8 + ROW * Math.min(3, Math.ceil(images.length / IN_A_ROW)) });
}

app.registerExtension({
  name: "sdxlloranodes.badges",
  nodeCreated(node) {
    if (node.comfyClass !== "SDXLGenerateCached") return;
    const { onExecuted } = node;
    node.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      if (output?.sdxl_lora_made) showBadges(this, output.sdxl_lora_made);
    };
  },
});
