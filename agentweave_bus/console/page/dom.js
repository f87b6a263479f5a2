// Making nodes and keeping them. What is shown gets in as text or as an attribute, never as markup.

import { shown } from "./words.js";

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

/** Make an element. `attributes` may have `on`: listeners by event. Children are nodes, texts or null. */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "on") {
      for (const [event, heard] of Object.entries(value)) node.addEventListener(event, heard);
    } else set(node, name, value);
  }
  for (const child of children.flat()) {
    if (child !== null && child !== undefined) node.append(child instanceof Node ? child : shown(child));
  }
  return node;
}

/** Make an SVG element. */
export function drawn(tag, attributes = {}) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

/** An icon of the page's own; what it means must stand beside it or be said in `label`. */
export function icon(name, label = "") {
  const node = drawn("svg", { class: "icon" });
  node.append(drawn("use", { href: `#i-${name}` }));
  if (label) {
    node.setAttribute("role", "img");
    node.setAttribute("aria-label", label);
  } else node.setAttribute("aria-hidden", "true");
  return node;
}

export function changeIcon(node, name) {
  const use = node.firstChild;
  if (use.getAttribute("href") !== `#i-${name}`) use.setAttribute("href", `#i-${name}`);
}

/** Show a text, and touch the page only if it is another one. */
export function say(node, value) {
  const text = shown(value);
  if (node.textContent !== text) node.textContent = text;
}

/** Set an attribute if it is another; `false`, `null` and `undefined` take it away. */
export function set(node, name, value) {
  if (value === false || value === null || value === undefined) {
    if (node.hasAttribute(name)) node.removeAttribute(name);
    return;
  }
  const text = value === true ? "" : name === "title" ? shown(value) : String(value);
  if (node.getAttribute(name) !== text) node.setAttribute(name, text);
}

/**
 * Have `parent` hold one node per item, in their order. A node stays with its key, so that focus, selection and
 * scrolling stay; `make(item)` builds one with its own `refresh(item)`.
 */
export function keyed(parent, items, keyOf, make) {
  const before = (parent.kept ??= new Map());
  const now = new Map();
  let place = parent.firstChild;
  for (const item of items) {
    const key = keyOf(item);
    if (now.has(key)) continue;
    let node = before.get(key);
    if (node === undefined) node = make(item);
    else before.delete(key);
    node.refresh?.(item);
    now.set(key, node);
    if (node === place) place = place.nextSibling;
    else parent.insertBefore(node, place);
  }
  for (const node of before.values()) node.remove();
  parent.kept = now;
}

/** Give a node what refreshes it, and return it. */
export function refreshing(node, refresh) {
  node.refresh = refresh;
  return node;
}

/** Run `what` in the next frame, once for however often it is asked. */
export function inNextFrame(what) {
  let waiting = false;
  return () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      what();
    });
  };
}

/** Run `what` when nothing has asked for it for `ms`. */
export function afterRest(what, ms) {
  let timer = 0;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(what, ms);
  };
}
