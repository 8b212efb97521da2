// A sample in large: the arrow keys left and right go through the steps, up and down through the prompts.
import { element } from "./panel.js";
import { say } from "./words.js";

/** `rows` has the samples of each step, oldest first; `urlOf` gives a sample's address. `panel` holds the dialog. */
export function openViewer(panel, rows, row, column, urlOf) {
  const picture = element("img", { style: { maxWidth: "90vw", maxHeight: "80vh", minWidth: "40vw", objectFit: "contain" } });
  const caption = element("div", { style: { padding: "8px", textAlign: "center" } });
  const dialog = element(
    "dialog",
    { className: "sdxl-lora-viewer", style: { background: "#111", color: "#ddd", border: "1px solid #555" } },
    picture,
    caption,
  );
  const show = () => {
    const sample = rows[row][Math.min(column, rows[row].length - 1)];
    picture.src = urlOf(sample);
    picture.alt = caption.textContent = describe(sample);
  };
  dialog.addEventListener("keydown", (event) => {
    event.stopPropagation();
    const [down, right] = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key] ?? [];
    if (right === undefined) return;
    event.preventDefault();
    row = Math.max(0, Math.min(rows.length - 1, row + right));
    column = Math.max(0, Math.min(rows[row].length - 1, column + down));
    show();
  });
  dialog.addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => dialog.remove());
  panel.append(dialog); // shown in the top layer, whatever is around it
  show();
  dialog.showModal();
}

export function describe({ step, prompt, clip_score: score }) {
  const when = step === null ? say("finished LoRA") : say("step {step}", { step });
  return [when, score === null ? "" : `CLIP ${score.toFixed(1)}`, prompt ?? ""].filter(Boolean).join(" · ");
}
