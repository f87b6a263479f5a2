// Times on the page: how long ago, kept up to date; when exactly, on pointing at them.

import { el, set } from "./dom.js";
import { ago, exact } from "./words.js";

let now = () => Date.now();

/** Begin to keep times up to date, by the server's clock. */
export function keepTime(server) {
  now = server;
  setInterval(() => {
    if (document.hidden) return;
    for (const node of document.querySelectorAll("time[data-at]")) tick(node);
  }, 1000);
}

export function timeNode(at) {
  const node = el("time");
  showTime(node, at);
  return node;
}

export function showTime(node, at) {
  if (!Number.isFinite(at)) {
    set(node, "data-at", null);
    set(node, "title", null);
    node.textContent = "";
    return;
  }
  if (node.dataset.at !== String(at)) {
    node.dataset.at = at;
    node.title = exact(at);
  }
  tick(node);
}

function tick(node) {
  const text = ago(Number(node.dataset.at), now());
  if (node.firstChild === null || node.firstChild.data !== text) node.textContent = text;
}
