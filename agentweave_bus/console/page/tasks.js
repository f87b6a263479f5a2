// The newest tasks, or those that a filter finds.

import { showTime, timeNode } from "./clock.js";
import { afterRest, byId, changeIcon, el, icon, keyed, refreshing, say, set } from "./dom.js";
import { fetched } from "./live.js";
import { agentName, amount, exact, ident, lasted, plural, stateOf, STATES, who } from "./words.js";

const MOST_ROWS = 200;
const FIND_MS = 1_000;
const TYPING_MS = 200;

export const storyOf = (key) => `#/task/${encodeURIComponent(key)}`;
export const placeOf = (one) => `${one.agent} ${one.key}`; // any agent may write records under any key

export class Tasks {
  constructor(live) {
    this._live = live;
    this._found = null; // what the server has found for the filter, or null without one
    this._asking = null;
    this._body = byId("tasks");
    this._fresh = false;
    this._rows = [];
    this._pointed = false;
    this._stateBox = byId("filter-state");
    this._agentBox = byId("filter-agent");
    this._textBox = byId("filter-text");
    for (const { name, label } of STATES) this._stateBox.append(el("option", { value: name }, label));
    const changed = () => this._changed();
    this._stateBox.addEventListener("change", changed);
    this._agentBox.addEventListener("change", changed);
    this._textBox.addEventListener("input", afterRest(changed, TYPING_MS));
    byId("tasks-filter").addEventListener("submit", (event) => event.preventDefault());
    this._body.addEventListener("click", opened);
    this._body.addEventListener("pointermove", (event) => this._point(event.pointerType === "mouse"));
    this._body.addEventListener("pointerleave", () => this._point(false));
    this._findSoon = throttled(() => this._find(), FIND_MS);
    live.on(["agents"], (state) => this._agents(state));
    live.on(["tasks"], () => {
      if (this._filter() !== null) this._findSoon();
      else this._draw();
    });
  }

  /** Show only the tasks of a state; the same one again shows all. */
  choose(state) {
    this._stateBox.value = this._stateBox.value === state ? "" : state;
    this._changed();
  }

  _filter() {
    const asked = new URLSearchParams();
    if (this._stateBox.value) asked.set("state", this._stateBox.value);
    if (this._agentBox.value) asked.set("agent", this._agentBox.value);
    if (this._textBox.value.trim()) asked.set("q", this._textBox.value.trim());
    return asked.size ? asked : null;
  }

  _changed() {
    for (const tile of document.querySelectorAll(".count")) {
      set(tile, "aria-pressed", String(tile.dataset.state === this._stateBox.value));
    }
    this._pointed = false;
    if (this._filter() !== null) this._find();
    else {
      this._asking?.abort();
      this._found = null;
      this._draw();
    }
  }

  async _find() {
    const filter = this._filter();
    if (filter === null) return;
    this._asking?.abort();
    const asking = (this._asking = new AbortController());
    try {
      this._found = await fetched(`/api/tasks?${filter}`, asking.signal);
    } catch (error) {
      if (error.name === "AbortError") return;
      this._found = { tasks: [], matched: 0, error: error.message };
    }
    if (asking === this._asking && this._filter() !== null) this._draw();
  }

  _agents(state) {
    keyed(this._agentBox, [{ agent: "", name: "any agent" }, ...(state.agents ?? [])], (one) => one.agent,
      (one) => el("option", { value: one.agent }, one.name));
  }

  _draw() {
    const state = this._live.state;
    if (state === null) return;
    let rows = (this._found?.tasks ?? state.tasks ?? []).slice(0, MOST_ROWS);
    const newer = this._pointed ? this._held(rows) : 0;
    if (newer) rows = this._rows;
    this._rows = rows;
    keyed(this._body, rows, placeOf, (one) => row(one, this._fresh));
    this._fresh = true;
    const matched = this._found === null ? state.held : this._found.matched;
    const held = newer ? ` · ${amount(newer)} newer, held while you point` : "";
    say(byId("tasks-note"), this._note(rows.length, matched, state.held) + held);
    this._empty(rows.length === 0);
  }

  // Rows do not move under the pointer: those that are there say what is new of them, others have to wait.
  _held(newest) {
    const now = new Map(newest.map((one) => [placeOf(one), one]));
    const there = new Set(this._rows.map(placeOf));
    const newer = newest.filter((one) => !there.has(placeOf(one))).length;
    this._rows = this._rows.map((one) => now.get(placeOf(one)) ?? one);
    return newer;
  }

  _point(pointed) {
    if (this._pointed === pointed) return;
    this._pointed = pointed;
    if (!pointed) this._draw();
  }

  _note(shown, matched, held) {
    if (shown === 0) return "";
    const which = shown < matched ? `newest ${amount(shown)} of ${amount(matched)}` : amount(shown);
    return this._found === null ? which : `${which} found among ${amount(held)}`;
  }

  _empty(none) {
    const node = byId("tasks-empty");
    node.hidden = !none;
    if (!none) return;
    const agent = this._live.state.agents?.[0]?.agent ?? `spiffe://${this._live.state.trust_domain}/agent/NAME`;
    if (this._found?.error) node.replaceChildren(`The list can't be had: ${this._found.error}.`);
    else if (this._found) node.replaceChildren("No task that is held here matches the filter.");
    else {
      node.replaceChildren("No task yet. Submit one, and it is here at once: ",
        el("code", {}, `agentweave submit ${agent} CAPABILITY --data '{…}'`));
    }
  }
}

// At once, and then no more often than every `ms`; what was asked in between is done at the end of it.
function throttled(what, ms) {
  let timer = 0;
  let again = false;
  return function ask() {
    if (timer) {
      again = true;
      return;
    }
    what();
    timer = setTimeout(() => {
      timer = 0;
      if (again) {
        again = false;
        ask();
      }
    }, ms);
  };
}

// Anywhere in a row opens its story, but who selects a text wants the text.
function opened(event) {
  if (event.target.closest("a, button") || String(getSelection())) return;
  event.target.closest("tr")?.querySelector("a")?.click();
}

/** A state in its sign and its word. */
export function stateMark(name) {
  const mark = icon(stateOf(name).icon);
  const word = el("span");
  const node = el("span", { class: "state" }, mark, word);
  return refreshing(node, (now) => {
    const of = stateOf(now);
    set(node, "data-state", of.name);
    changeIcon(mark, of.icon);
    say(word, of.label);
  });
}

function row(of, fresh) {
  const state = stateMark(of.state);
  const what = el("a", { href: storyOf(of.key), class: "what" });
  const agent = el("span", { class: "agent-of" });
  const id = el("td", { class: "c-id mono" });
  const from = el("td", { class: "c-from" });
  const said = el("td", { class: "c-said" });
  const tries = el("td", { class: "c-tries num" });
  const took = el("td", { class: "c-took num" });
  const when = timeNode(of.since);
  const node = el("tr", { class: fresh ? "fresh" : null },
    el("td", { class: "c-state" }, state), el("td", { class: "c-what" }, what, " ", agent),
    id, from, said, tries, took, el("td", { class: "c-when num" }, when));
  return refreshing(node, (one) => {
    if (node.of === one) return;
    node.of = one;
    state.refresh(one.state);
    set(node, "data-state", stateOf(one.state).name);
    say(what, one.capability ?? "unknown task");
    say(agent, `at ${agentName(one.agent)}`);
    set(agent, "title", one.agent);
    say(id, ident(one.id ?? one.key));
    set(id, "title", one.id ?? one.key);
    say(from, who(one.sender));
    set(from, "title", one.sender);
    say(said, one.message ?? "");
    set(said, "title", one.message || null);
    say(tries, one.attempt > 1 ? one.attempt : "");
    set(tries, "title", plural(one.attempt ?? 1, "attempt"));
    say(took, one.took_ms === null ? "" : lasted(one.took_ms));
    set(took, "title", `First seen ${exact(one.at_first)}`);
    showTime(when, one.since);
  });
}
