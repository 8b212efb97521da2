// What the nodes of this workflow do: from the server's messages, and for a page that opens later from its route.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const listeners = [];
const latest = new Map(); // by workflow and node, as the server keeps them
const key = (status) => `${status.workflow}/${status.node}`;

/** Calls `show(node, status)` for each message about a node of the open workflow, and once when it is opened. */
export function onStatus(show) {
  listeners.push(show);
}

/** The latest status of a node of the open workflow. A node inside a subgraph has one for each use of the subgraph. */
export function statusOf(node) {
  return [...latest.values()].filter((status) => nodeOf(status) === node).at(-1);
}

/** The node that a status is about; undefined if it is not in the open workflow. */
export function nodeOf(status) {
  const open = status.workflow && status.workflow === (app.rootGraph ?? app.graph)?.id;
  return open ? nodeAt(status.node) : undefined;
}

/** The node of an execution's id: ids from the outermost subgraph to the node, joined by colons. */
export function nodeAt(execution) {
  let graph = app.rootGraph ?? app.graph;
  let node;
  for (const id of String(execution).split(":")) {
    node = graph?.getNodeById(id) ?? graph?.getNodeById(Number(id));
    graph = node?.subgraph;
  }
  return node ?? undefined;
}

function tell(status) {
  const node = nodeOf(status);
  if (node) for (const show of listeners) show(node, status);
}

function take(status) {
  latest.delete(key(status));
  latest.set(key(status), status);
  tell(status);
}

/** Newer pages keep the message of a failed node behind a button: it belongs on the node. */
function takeError({ prompt_id: prompt, node_id: node, exception_message: message }) {
  const workflow = (app.rootGraph ?? app.graph)?.id;
  const known = latest.get(key({ workflow, node }));
  if (known?.prompt === prompt && known.state === "failed") return; // with more than this
  const nothing = { phase: "", done: 0, total: 0, detail: "", run: null, numbers: {}, points: [] };
  take({ workflow, node, prompt, state: "failed", message: message.trim(), ...nothing });
}

async function takeAll() {
  const response = await api.fetchApi("/sdxl_lora/status");
  if (!response.ok) return;
  for (const status of await response.json()) take({ ...status, points: [] });
}

// Now, not in setup: the page reports messages that arrive before anything listens to their type.
api.addEventListener("sdxl_lora.status", ({ detail }) => take(detail));

app.registerExtension({
  name: "sdxlloranodes.status",
  setup() {
    api.addEventListener("execution_error", ({ detail }) => takeError(detail));
    api.addEventListener("reconnected", takeAll);
    takeAll();
  },
  afterConfigureGraph() {
    for (const status of latest.values()) tell({ ...status, points: [] });
  },
});
