// Shows on a node what it has to say: what the last run skipped, a report, a comparison. On a node with several
// methods it shows the inputs of the chosen one.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const BOX = "fastercache_text";
const MARGIN = 10;
const SENTENCE = { width: 270, height: 54 }; // room for the one line that a run sends
const TABLE = { width: 350, height: 132 }; // room for what an output node writes

const STYLE = {
  boxSizing: "border-box",
  width: "100%",
  height: "100%",
  contain: "size", // the text never resizes the node, so a run does not change the workflow
  overflow: "auto",
  padding: "6px 8px",
  borderRadius: "4px",
  background: "var(--comfy-input-bg)",
  color: "var(--input-text)",
  font: "11px/1.4 monospace",
  whiteSpace: "pre-wrap",
  userSelect: "text",
};

/** True for nodes of this pack that report: they know their own id, or show text as output nodes. */
function reports(node) {
  const definition = node.constructor.nodeData;
  return /^FasterCache/.test(node.comfyClass) && (definition.output_node || "unique_id" in (definition.hidden ?? {}));
}

/** Add the read-only text box; it is part neither of the saved workflow nor of the prompt. */
function addBox(node) {
  const { width, height } = node.constructor.nodeData.output_node ? TABLE : SENTENCE;
  const box = document.createElement("div");
  Object.assign(box.style, STYLE, { minHeight: `${height}px` });
  box.className = "widget-expands"; // it takes the room that is left when the node is made taller
  box.setAttribute("role", "status");
  box.textContent = "not run yet";
  box.onwheel = (event) => passWheel(box, event);
  const options = { serialize: false, getMinHeight: () => height + 2 * MARGIN, margin: MARGIN };
  node.addDOMWidget(BOX, "FASTERCACHE_TEXT", box, options).serialize = false;
  node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], node.computeSize()[1])]);
}

/** Let the wheel scroll a long text, and zoom the canvas over a short one. */
function passWheel(box, event) {
  event.stopPropagation();
  if (box.scrollHeight <= box.clientHeight) app.canvas.processMouseWheel(event);
}

/** The node with an execution id: "5", or "1:2:5" for node 5 in subgraph node 2 in subgraph node 1. */
function findNode(executionId) {
  const path = String(executionId).split(":");
  const id = path.pop();
  const graph = path.reduce((inside, step) => inside?.getNodeById(step)?.subgraph, app.graph);
  return graph?.getNodeById(id);
}

/** Write `text` into the box of a node, if the open workflow has the node and the node has the box. */
function show(executionId, text) {
  const box = findNode(executionId)?.widgets?.find((widget) => widget.name === BOX);
  if (box && text) box.element.textContent = text;
}

/** Show those inputs of a node that its method has; hidden ones keep their values. */
function showMethod(node) {
  const { required, optional } = node.constructor.nodeData.input ?? {};
  const method = node.widgets?.find((widget) => widget.name === "method")?.value;
  for (const widget of node.widgets ?? []) {
    const methods = { ...required, ...optional }[widget.name]?.[1]?.shown_with;
    if (methods) widget.hidden = widget.options.hidden = !methods.includes(method);
  }
  node.setSize([node.size[0], node.computeSize()[1]]);
  app.canvas?.setDirty(true, true);
}

/** Follow the method of a node, typed or loaded; older pages know no hidden inputs and show all. */
function followMethod(node) {
  const widget = node.widgets?.find(({ name }) => name === "method");
  if (!widget || !/^FasterCacheKSampler/.test(node.comfyClass)) return;
  const { callback } = widget, { onConfigure } = node;
  widget.callback = (...values) => { callback?.apply(widget, values); showMethod(node); };
  node.onConfigure = (...values) => { onConfigure?.apply(node, values); showMethod(node); };
  showMethod(node);
}

app.registerExtension({
  name: "FasterCache.Report",
  nodeCreated(node) {
    if (reports(node)) addBox(node);
    followMethod(node);
  },
  setup() {
    api.addEventListener("fastercache.report", ({ detail }) => show(detail.node, detail.text));
    api.addEventListener("executed", ({ detail }) =>
      show(detail.display_node ?? detail.node, [detail.output?.text].flat().join("\n")));
  },
});
