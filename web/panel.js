// A panel of our own on a node: an element below the widgets, in every renderer of ComfyUI's page.

// Nodes 2.0 shows DOM widgets of the types that it knows, such as "text", by components of its own.
const TYPE = "sdxl_lora_panel";

/**
 * Adds `element` below the widgets of a node. It is not saved with the workflow and is no input of the node.
 * A panel that exists already under this name is replaced. The node grows if the panel needs more room.
 *
 * @param {string} name of the widget, one for each panel of a node
 * @param {{minHeight?: number}} options minHeight in pixels at zoom 1
 */
export function addPanel(node, name, element, { minHeight = 90 } = {}) {
  const widget = findPanel(node, name) ?? newPanel(node, name);
  // Nodes 2.0 keeps the element of a widget that is replaced by one of the same name, so the box stays.
  if (widget.element.firstChild !== element) widget.element.replaceChildren(element);
  widget.minHeight = minHeight;
  widget.element.style.minHeight = `${minHeight}px`;
  grow(node);
  return widget;
}

function newPanel(node, name) {
  const box = element("div", { className: "sdxl-lora-box" });
  const options = { serialize: false, hideOnZoom: false, getMinHeight: () => widget?.minHeight ?? 0 };
  let widget;
  widget = node.addDOMWidget(name, TYPE, box, options);
  widget.serialize = false; // this one keeps it out of the saved workflow, the option out of the prompt
  keepKeysAndWheel(box);
  return widget;
}

export function findPanel(node, name) {
  return node.widgets?.find((widget) => widget.name === name && widget.type === TYPE);
}

export function removePanel(node, name) {
  const widget = findPanel(node, name);
  if (!widget) return;
  widget.onRemove?.();
  node.widgets.splice(node.widgets.indexOf(widget), 1);
  node.setDirtyCanvas?.(true);
}

/** Enlarges the node to what its widgets need, and never makes it smaller than the user has made it. */
export function grow(node) {
  const [width, height] = node.computeSize();
  node.setSize?.([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
  node.setDirtyCanvas?.(true);
}

/** Keys typed in the panel are no shortcuts of the page, and what scrolls in it does not zoom the canvas. */
function keepKeysAndWheel(element) {
  element.addEventListener("keydown", (event) => event.stopPropagation());
  // Nodes 2.0 leaves the wheel to an element with this mark while it has the focus, so a click in the panel gives it.
  element.dataset.captureWheel = "true";
  element.tabIndex = -1;
  element.addEventListener("pointerdown", () => {
    if (!element.contains(document.activeElement)) element.focus({ preventScroll: true });
  });
  element.addEventListener("wheel", (event) => {
    if (event.ctrlKey) return;
    const scrolling = event.target.closest?.("[data-scrolls]");
    if (scrolling && scrolling.scrollHeight > scrolling.clientHeight) event.stopPropagation();
  });
}

/** An element with attributes and children: element("a", { href: "x" }, "text"). */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "style") Object.assign(made.style, value);
    else if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

/** All nodes of the open workflow, those inside subgraphs too. */
export function* allNodes(graph) {
  for (const node of graph?.nodes ?? graph?._nodes ?? []) {
    yield node;
    if (node.subgraph) yield* allNodes(node.subgraph);
  }
}
