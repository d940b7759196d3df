// Elements, made without any HTML text: what comes from a server or a person is only ever put in as text.

const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  for (const child of children.flat()) if (child !== null && child !== undefined) node.append(child);
  return node;
}

/** An HTML element. `onclick` and its kin are listeners; a false or missing attribute is left out. */
export const h = (name, attributes = {}, ...children) => fill(document.createElement(name), attributes, children);

/** An SVG element, likewise. */
export const s = (name, attributes = {}, ...children) => fill(document.createElementNS(SVG, name), attributes, children);

/** Set a node's text where it differs, so that a screen reader and a selection are left alone. */
export function setText(node, value) {
  if (node.textContent !== value) node.textContent = value;
}

/** Tell a screen reader. */
export function say(message) {
  setText(document.getElementById("said"), message);
}

/** Do `work` now and again every so many seconds, while the page can be seen, until `signal` is aborted. */
export function poll(work, seconds, signal) {
  let timer;
  const turn = async () => {
    if (!document.hidden) await work();
    if (!signal.aborted) timer = setTimeout(turn, seconds * 1000);
  };
  signal.addEventListener("abort", () => clearTimeout(timer));
  return turn();
}

/** Keep a list's elements in step with `items`: one element for each key, moved and updated, never made anew. */
export function keyed(parent, items, key, make, update) {
  const known = new Map([...parent.children].map((node) => [node.dataset.key, node]));
  items.forEach((item, place) => {
    let node = known.get(key(item));
    if (node === undefined) {
      node = make(item);
      node.dataset.key = key(item);
    }
    known.delete(key(item));
    if (parent.children[place] !== node) parent.insertBefore(node, parent.children[place] ?? null);
    update(node, item);
  });
  for (const node of known.values()) node.remove();
}

/** Ask before something that cannot be undone. Resolves to whether it was confirmed. */
export function confirm(title, explanation, action, otherwise = "Keep it") {
  return new Promise((resolve) => {
    const dialog = h("dialog", { "aria-labelledby": "dialog-title" },
      h("form", { method: "dialog" },
        h("h2", { id: "dialog-title" }, title),
        h("p", {}, explanation),
        h("div", { class: "actions" },
          h("button", { value: "no", class: "plain", autofocus: true }, otherwise),
          h("button", { value: "yes", class: "danger" }, action))));
    dialog.addEventListener("close", () => {
      resolve(dialog.returnValue === "yes");
      dialog.remove();
    });
    document.body.append(dialog);
    dialog.showModal();
  });
}
