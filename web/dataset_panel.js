// On Load Caption Dataset: the images with their captions, which are edited in place, and uploads into a new folder.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { ask, fromDrop, fromInput, hasFiles, upload } from "./dataset_upload.js";
import { addPanel, allNodes, element } from "./panel.js";
import { nodeAt } from "./status.js";
import { say } from "./words.js";

const NODE = "LoadCaptionDataset";
const PANEL = "sdxl_lora_dataset";
const HEIGHT = 250; // pixels

const panels = new WeakMap(); // by node

class DatasetPanel {
  constructor(node) {
    this.node = node;
    this.of = null; // the folder that edits and the message are about
    this.data = null; // the folder's images, as the server lists them
    this.checked = null; // what the last run has found besides
    this.edits = []; // that Undo takes back: the image and its caption before
    this.build();
    addPanel(node, PANEL, this.root, { minHeight: HEIGHT });
  }

  build() {
    const files = element("input", { type: "file", multiple: true, style: { display: "none" } });
    files.onchange = () => this.upload(fromInput(files));
    const add = button(say("Add images"), say("Uploads images and their .txt files into a new folder."), () => files.click());
    const refresh = button(say("Refresh"), say("Reads the folder and the list of folders again."), () =>
      this.report(async () => {
        await this.load();
        return refreshFolders();
      }),
    );
    this.undo = button(say("Undo"), "", () => this.report(() => this.takeBack()));
    this.undo.hidden = true;
    this.message = element("div", { className: "sdxl-lora-message" });
    this.problems = element("div", { className: "sdxl-lora-problems" });
    this.title = element("div", { className: "sdxl-lora-title" });
    this.cells = element("div", { className: "sdxl-lora-cells" });
    const buttons = element("div", { className: "sdxl-lora-buttons" }, add, refresh, this.undo, files);
    const parts = [buttons, this.message, this.problems, this.title, this.cells];
    this.root = element("div", { className: "sdxl-lora-dataset" }, ...parts);
    this.root.dataset.scrolls = "";
    takeDrops(this.root, (transfer) => this.upload(fromDrop(transfer)));
  }

  /** The folder that the node reads. If another node gives it, that is known after a run. */
  folder() {
    const gives = (input) => input.widget?.name === "folder" || input.name === "captioned_folder";
    const linked = this.node.inputs?.some((input) => gives(input) && input.link != null);
    return linked ? this.checked?.folder : valueOf(this.node, "folder");
  }

  /** Shows the images of the folder. `checked` is what a run has found. */
  async load(checked = this.checked) {
    this.checked = checked;
    const folder = this.folder();
    if (!folder) return;
    if (folder !== this.of) this.begin(folder);
    const query = new URLSearchParams({ folder, trigger_word: valueOf(this.node, "trigger_word") ?? "" });
    const { error, ...listed } = await ask(`/sdxl_lora/dataset?${query}`).catch(({ message }) => ({ error: message }));
    if (folder !== this.folder()) return; // another was chosen meanwhile
    const typing = this.data?.folder === folder && this.cells.querySelector("textarea");
    if (typing) return; // saving lists the folder again
    if (error) this.tell(error, true);
    const found = error ? { entries: [], total: 0, unused: 0, problems: [], notes: [] } : listed;
    this.show({ folder, ...found, ...(checked?.folder === folder ? checked : {}) });
  }

  begin(folder) {
    this.of = folder;
    this.edits = [];
    this.tell("");
  }

  show(data) {
    this.data = data;
    const { entries, total, unused, notes } = data;
    const one = "1 image without a caption is skipped", several = "{count} images without a caption are skipped";
    const problem = say(unused === 1 ? one : several, { count: unused });
    const advice = say("{problem}: click below one to write it, or give a trigger_word.", { problem });
    const problems = unused ? [advice, ...data.problems] : data.problems;
    const note = (textContent) => element("div", { className: "sdxl-lora-note", textContent });
    this.problems.replaceChildren(...problems.map((textContent) => element("div", { textContent })), ...notes.map(note));
    const some = entries.length < total;
    const count = say(some ? "the first {shown} of {total} images" : "{total} images", { shown: entries.length, total });
    this.title.textContent = say("{folder}: {count}. Click a caption to edit it.", { folder: data.folder, count });
    this.cells.replaceChildren(...entries.map((entry) => this.cell(entry)));
  }

  cell(entry) {
    const query = new URLSearchParams({ folder: this.data.folder, image: entry.name, at: entry.version });
    const picture = element("img", { src: api.apiURL(`/sdxl_lora/dataset/thumbnail?${query}`), alt: entry.name });
    picture.title = entry.name;
    picture.loading = "lazy";
    const caption = element("figcaption", { tabIndex: 0, title: say("Click to edit this caption") });
    const figure = element("figure", {}, picture, caption);
    figure.dataset.image = entry.name;
    caption.onclick = () => this.edit(entry, caption);
    caption.onkeydown = (event) => {
      if (event.key !== "Enter" || event.target !== caption) return; // returning false would cancel what is typed
      event.preventDefault();
      this.edit(entry, caption);
    };
    this.write(entry, caption);
    return figure;
  }

  write(entry, caption) {
    const word = valueOf(this.node, "trigger_word")?.trim();
    const missing = say(entry.used && word ? "{word} (no caption file)" : "no caption: click to write one", { word });
    caption.textContent = entry.caption || missing;
    caption.dataset.empty = entry.caption ? "" : entry.used ? "yes" : "unused";
  }

  edit(entry, caption) {
    if (caption.querySelector("textarea")) return;
    const area = element("textarea", { value: entry.caption, rows: 4 });
    area.title = say("Enter saves, Shift+Enter begins a line, Escape leaves the caption as it was.");
    const close = (save) => {
      area.onblur = null;
      const text = area.value.trim();
      this.write(entry, caption);
      if (save && text !== entry.caption) this.report(() => this.save(entry, text, true));
    };
    area.onkeydown = (event) => {
      if (event.key === "Escape" || (event.key === "Enter" && !event.shiftKey)) {
        event.preventDefault();
        close(event.key === "Enter");
      }
    };
    area.onblur = () => close(true);
    area.onclick = (event) => event.stopPropagation();
    caption.replaceChildren(area);
    area.focus();
  }

  /** Writes a caption; null removes the file that an edit has created. */
  async save(entry, text, undoable) {
    if (text === "" && undoable) throw new Error(say("the caption is empty: describe what the image shows"));
    const body = JSON.stringify({ folder: this.data.folder, image: entry.name, text });
    const headers = { "Content-Type": "application/json" };
    const { previous } = await ask("/sdxl_lora/dataset/caption", { method: "POST", headers, body });
    if (undoable) this.edits.push({ entry, previous });
    await this.load();
    return say(undoable ? "The caption of {name} is saved. Run reads it." : "The caption of {name} is as before.", entry);
  }

  async takeBack() {
    const { entry, previous } = this.edits.at(-1);
    const said = await this.save(entry, previous, false);
    this.edits.pop();
    return said;
  }

  async upload(found) {
    await this.report(async () => {
      const { name, files } = await found;
      const { folder, stored, refused } = await upload(name, files, (done) =>
        this.tell(say("uploading {done} of {total} files ...", { done, total: files.length })),
      );
      await refreshFolders();
      choose(this.node, folder);
      const left = refused.map(({ file, reason }) => `${file}: ${reason}`);
      if (left.length) throw new Error([say("{stored} files are in {folder}, not these:", { stored, folder }), ...left].join("\n"));
      return say("{stored} files are in {folder}. Run reads them.", { stored, folder });
    });
  }

  /** Does something and shows what it says, or why it failed. */
  async report(work) {
    try {
      this.tell(await work());
    } catch (error) {
      this.tell(error.message, true);
    }
  }

  tell(text, failed = false) {
    this.message.textContent = text;
    this.message.dataset.failed = failed ? "yes" : "";
    const last = this.edits.at(-1);
    this.undo.hidden = !last;
    this.undo.title = last ? say("Gives {name} its caption before the edit.", last.entry) : "";
  }
}

function button(textContent, title, onclick) {
  return element("button", { textContent, title, onclick });
}

const widgetOf = (node, name) => node.widgets?.find((widget) => widget.name === name);
const valueOf = (node, name) => widgetOf(node, name)?.value;

async function refreshFolders() {
  const names = await ask("/sdxl_lora/datasets");
  const declared = window.LiteGraph?.registered_node_types?.[NODE]?.nodeData?.input?.required?.folder;
  if (Array.isArray(declared?.[0])) declared[0] = names; // of nodes that are added later
  for (const node of allNodes(app.rootGraph ?? app.graph)) {
    const widget = node.comfyClass === NODE && widgetOf(node, "folder");
    if (widget) widget.options.values = names;
  }
  return say("{count} datasets. Folders without images are not listed.", { count: names.length });
}

function choose(node, folder) {
  const widget = widgetOf(node, "folder");
  widget.value = folder;
  widget.callback?.(folder);
  node.setDirtyCanvas?.(true);
}

function loadOnChange(panel, widget) {
  if (!widget) return;
  const { callback } = widget;
  widget.callback = function () {
    callback?.apply(this, arguments);
    panel.load();
  };
}

// Where the page itself would open a dropped image as a workflow.
function takeDrops(root, take) {
  root.addEventListener("dragover", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    event.stopPropagation();
  });
  root.addEventListener("drop", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    event.stopPropagation();
    take(event.dataTransfer);
  });
}

// The grid shows the images. Added before the page's own listener, which would show the sheet of them as well.
api.addEventListener("executed", ({ detail }) => {
  if (nodeAt(detail.display_node ?? detail.node)?.comfyClass === NODE) delete detail.output?.images;
});

app.registerExtension({
  name: "sdxlloranodes.dataset",
  nodeCreated(node) {
    if (node.comfyClass !== NODE) return;
    const panel = new DatasetPanel(node);
    panels.set(node, panel);
    for (const name of ["folder", "trigger_word"]) loadOnChange(panel, widgetOf(node, name));
    setTimeout(() => panel.load(), 0); // of a node that is added, by its default
    const { onExecuted } = node;
    node.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      const [data] = output?.sdxl_lora_dataset ?? [];
      if (data) panels.get(this).load(data);
    };
    node.onDragOver = hasFiles;
    node.onDragDrop = (event) => {
      if (!hasFiles(event)) return false;
      panels.get(node).upload(fromDrop(event.dataTransfer));
      return true;
    };
  },
  afterConfigureGraph() {
    for (const node of allNodes(app.rootGraph ?? app.graph)) panels.get(node)?.load();
  },
});
