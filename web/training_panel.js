// The panel of a training on its node: what it does, its losses, samples and checkpoints, and the last runs.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { drawLosses, legend, STEP } from "./loss_chart.js";
import { addPanel, allNodes, element } from "./panel.js";
import { describe, openViewer } from "./sample_viewer.js";
import { nodeAt, onStatus, statusOf } from "./status.js";
import { say } from "./words.js";

const NODE = "TrainSDXLLoRA";
const PANEL = "sdxl_lora_training";
const MIN_HEIGHT = 380;

const panels = new WeakMap(); // by node

class TrainingPanel {
  constructor(node) {
    this.node = node;
    this.status = null;
    this.run = emptyRun(); // that the node trains, or trained last
    this.shown = this.run;
    this.rates = false;
    this.build();
    addPanel(node, PANEL, this.root, { minHeight: MIN_HEIGHT });
    new ResizeObserver(() => this.draw()).observe(this.canvas);
  }

  build() {
    this.headline = element("div", { className: "sdxl-lora-headline" });
    this.stop = element("button", { textContent: say("Stop and keep"), onclick: () => this.stopAndKeep() });
    this.stop.title = say("Ends the training after the current step and saves the LoRA.");
    this.bar = element("progress", { max: 1, value: 0 });
    this.message = element("div", { className: "sdxl-lora-message" });
    this.numbers = element("div", { className: "sdxl-lora-numbers" });
    this.canvas = element("canvas");
    this.legend = element("div", { className: "sdxl-lora-legend" });
    this.samples = element("div", { className: "sdxl-lora-samples" });
    this.runs = element("select", { onchange: () => this.choose(this.runs.value) });
    this.runs.title = say("The runs of this lora_name, the newest first.");
    this.list = element("label", {}, `${say("run")} `, this.runs);
    const rates = element("input", { type: "checkbox", onchange: () => this.showRates(rates.checked) });
    const top = element("div", { className: "sdxl-lora-row" }, this.headline, this.stop);
    const choices = element("div", { className: "sdxl-lora-row" }, element("label", {}, rates, ` ${say("learning rate")}`), this.list);
    this.root = element(
      "div",
      { className: "sdxl-lora-training" },
      ...[top, this.bar, this.message, this.numbers, this.canvas, this.legend, this.samples, choices],
    );
  }

  /** Takes a message about the node. Another prompt is a new run: what the last one has left is cleared. */
  take(status) {
    const before = this.status;
    this.status = status;
    if (status.prompt !== before?.prompt) this.begin();
    if (status.run && status.run !== this.run.name) this.follow(status.run);
    this.append(status.points);
    const sampled = before?.phase === "generating samples" && status.phase !== before.phase;
    if (sampled || status.state !== "running") this.reload();
    this.render();
  }

  begin() {
    this.run = emptyRun();
    this.shown = this.run;
    this.stop.disabled = false;
    this.stop.textContent = say("Stop and keep");
  }

  async follow(name) {
    this.run = emptyRun(name);
    this.shown = this.run;
    await this.reload();
    await this.listRuns(name);
  }

  append(points) {
    const { points: known } = this.run;
    for (const point of points) if (!known.length || point[STEP] > known.at(-1)[STEP]) known.push(point);
  }

  /** Gets the run's history from its folder, and keeps what arrived meanwhile. */
  async reload() {
    const run = this.run;
    const loaded = run.name && (await history(run.name));
    if (!loaded || this.run !== run) return;
    const arrived = run.points;
    Object.assign(run, loaded);
    this.append(arrived);
    this.render();
  }

  async listRuns(name) {
    const series = name.replace(/_\d{5}$/, "");
    const names = await runsOf(series);
    this.runs.replaceChildren(...names.map((value) => element("option", { value, textContent: value })));
    this.runs.value = this.shown.name;
  }

  async choose(name) {
    this.shown = name === this.run.name ? this.run : ((await history(name)) ?? this.run);
    this.render();
  }

  async stopAndKeep() {
    this.stop.disabled = true;
    this.stop.textContent = say("Stopping ...");
    const response = await api.fetchApi("/sdxl_lora/stop", { method: "POST" });
    if (!response.ok) this.stop.textContent = say("Nothing trains");
  }

  showRates(wanted) {
    this.rates = wanted;
    this.render();
  }

  render() {
    const { status } = this;
    const runs = status?.state === "running";
    this.headline.textContent = headline(status, this.shown);
    this.headline.classList.toggle("sdxl-lora-failed", status?.state === "failed" && status.run === this.shown.name);
    this.message.textContent = this.shown === this.run && status?.state !== "failed" ? (status?.message ?? "") : "";
    this.stop.style.display = runs ? "" : "none";
    this.bar.style.visibility = runs ? "visible" : "hidden";
    this.bar.value = runs && status.total ? status.done / status.total : 0;
    this.numbers.textContent = this.shown === this.run ? numbers(status) : "";
    this.list.style.display = this.runs.options.length > 1 ? "" : "none";
    this.renderLegend();
    this.renderSamples();
    this.draw();
  }

  renderLegend() {
    const items = this.shown.points.length ? legend(this.shown, this.rates) : [];
    this.legend.replaceChildren(
      ...items.map(([name, color]) => element("span", {}, element("i", { style: { background: color } }), name)),
    );
  }

  renderSamples() {
    const rows = byStep(this.shown.samples);
    const last = rows.length - 1;
    const signature = JSON.stringify([this.shown.name, rows[last]]);
    if (signature === this.drawnSamples) return;
    this.drawnSamples = signature;
    const url = (sample) => sampleUrl(this.shown.name, sample);
    this.samples.replaceChildren(
      ...(rows[last] ?? []).map((sample, column) => {
        const open = () => openViewer(this.root, byStep(this.shown.samples), last, column, url);
        const picture = element("img", { src: url(sample), alt: describe(sample), title: describe(sample), onclick: open });
        return element("figure", {}, picture, element("figcaption", { textContent: short(sample) }));
      }),
    );
  }

  draw() {
    if (this.pending) return;
    this.pending = requestAnimationFrame(() => {
      this.pending = 0;
      drawLosses(this.canvas, { ...this.shown, rates: this.rates });
    });
  }
}

function emptyRun(name = null) {
  return { name, points: [], samples: [], checkpoints: [] };
}

function headline(status, run) {
  if (!status || status.run !== run.name) return run.name ? say("run {name}", run) : "";
  if (status.state === "running") return status.phase ? say("{phase}: {done} of {total}", status) : say("starting");
  if (status.state === "failed") return say("failed: {message}", status);
  if (status.state === "cancelled") return cancelled(lastStep(run));
  return say("{name}: {steps} steps", { name: run.name, steps: lastStep(run) });
}

function cancelled(step) {
  if (!step) return say("cancelled before the first step");
  return say("cancelled at step {step}. Run continues from its checkpoint.", { step });
}

function lastStep(run) {
  return run.points.at(-1)?.[STEP] ?? 0;
}

function numbers(status) {
  if (status?.state !== "running") return "";
  return status.phase === "training" ? status.detail.replaceAll(", ", " · ") : status.detail;
}

function byStep(samples) {
  const steps = new Map();
  for (const sample of samples) steps.set(sample.step, [...(steps.get(sample.step) ?? []), sample]);
  return [...steps.values()];
}

function short({ step, clip_score: score }) {
  return [step === null ? say("finished") : say("step {step}", { step }), score === null ? "" : `CLIP ${score.toFixed(1)}`].filter(Boolean).join(" · ");
}

function sampleUrl(run, { image }) {
  const query = new URLSearchParams({ filename: image, subfolder: `lora_runs/${run}/samples`, type: "output" });
  return api.apiURL(`/view?${query}`);
}

async function history(name) {
  const response = await api.fetchApi(`/sdxl_lora/runs/${encodeURIComponent(name)}`);
  return response.ok ? response.json() : undefined;
}

async function runsOf(series) {
  const response = await api.fetchApi(`/sdxl_lora/runs?${new URLSearchParams({ series })}`);
  return response.ok ? response.json() : [];
}

function panelOf(node) {
  if (!panels.has(node)) panels.set(node, new TrainingPanel(node));
  return panels.get(node);
}

/** For a page that is opened after the run, or after the server's restart: the newest run of the node's lora_name. */
async function showLastRun(node) {
  const name = node.widgets?.find((widget) => widget.name === "lora_name")?.value;
  const [newest] = name ? await runsOf(name) : [];
  if (newest && !statusOf(node)) await panelOf(node).follow(newest);
}

// The panel shows the chart and the samples. Added before the page's own listener, which would show them once more.
api.addEventListener("executed", ({ detail }) => {
  const node = nodeAt(detail.display_node ?? detail.node);
  if (node?.comfyClass === NODE) delete detail.output?.images;
});

app.registerExtension({
  name: "sdxlloranodes.training",
  setup() {
    onStatus((node, status) => {
      if (node.comfyClass === NODE) panelOf(node).take(status);
    });
  },
  afterConfigureGraph() {
    for (const node of allNodes(app.rootGraph ?? app.graph)) if (node.comfyClass === NODE) showLastRun(node);
  },
});
