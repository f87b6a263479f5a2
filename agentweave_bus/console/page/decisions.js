// The stream of decisions: who, what, why. It can be held still, and filtered.

import { afterRest, byId, el, icon, keyed, say, set } from "./dom.js";
import { showTime, timeNode } from "./clock.js";
import { storyOf } from "./tasks.js";
import { agentName, amount, ident, plural, shown, who } from "./words.js";

const MOST_ROWS = 100;

export class Decisions {
  constructor(live) {
    this._live = live;
    this._held = null; // what is shown while it is paused
    this._kind = byId("decisions-kind");
    this._text = byId("decisions-text");
    this._button = byId("decisions-pause");
    const draw = () => this._draw();
    this._kind.addEventListener("change", draw);
    this._text.addEventListener("input", afterRest(draw, 100));
    this._button.addEventListener("click", () => this._pause());
    live.on(["decisions"], draw);
    live.on(["decision_counts"], (state) => counted(state.decision_counts ?? {}));
  }

  _pause() {
    this._held = this._held === null ? [...(this._live.state?.decisions ?? [])] : null;
    set(this._button, "aria-pressed", String(this._held !== null));
    this._draw();
  }

  _draw() {
    const state = this._live.state;
    if (state === null) return;
    const newest = state.decisions ?? [];
    const all = this._held ?? newest;
    this._count(newest);
    const words = this._text.value.trim().toLowerCase().split(/\s+/).filter(Boolean);
    const kind = this._kind.value;
    const rows = all.filter((one) => matches(one, kind, words)).slice(0, MOST_ROWS);
    const keys = new Map((state.tasks ?? []).map((one) => [one.id, one.key]));
    keyed(byId("decisions"), rows.length ? rows : [{ audit_id: "" }], (one) => `${one.log} ${one.audit_id}`,
      (one) => (one.audit_id ? row(one, keys.get(one.id)) : none(all.length > 0)));
  }

  _count(newest) {
    if (this._held === null) {
      say(this._button, "Pause");
      return;
    }
    const last = this._held[0];
    const place = last ? newest.findIndex((one) => one.audit_id === last.audit_id && one.log === last.log) : newest.length;
    const more = place < 0 ? `${newest.length}+` : place;
    say(this._button, place === 0 ? "Go on" : `Go on (${more} new)`);
  }
}

function counted({ allowed = 0, denied = 0, refused = 0 }) {
  const note = byId("decisions-note");
  say(note, `${amount(allowed)} allowed · ${amount(denied)} denied · ${amount(refused)} refused`);
  set(note, "data-some", denied + refused > 0);
}

function matches(one, kind, words) {
  const { verdict } = one;
  if (kind === "not-allowed" ? verdict === "allowed" : kind && verdict !== kind) return false;
  if (!words.length) return true;
  const text = [one.caller, one.callee, one.action, one.reason, one.id, one.audit_id, one.step].join(" ").toLowerCase();
  return words.every((word) => text.includes(word));
}

function none(filtered) {
  return el("li", { class: "empty" }, filtered
    ? "No decision among the newest 200 matches the filter."
    : "No decision is on record yet. Each call, task and event that is allowed, denied or refused on this machine shows here.");
}

// A decision does not change: its row is made once.
function row(one, task) {
  const { verdict } = one;
  const when = timeNode(one.at);
  showTime(when, one.at);
  const action = shown(one.action || "a message");
  return el("li", { "data-verdict": verdict },
    icon(verdict, verdict),
    el("p", { class: "who" },
      el("span", { title: one.caller || "its sender is not known" }, one.caller ? who(one.caller) : "somebody"),
      el("span", { class: "to" }, " → "),
      el("span", { title: one.callee }, agentName(one.callee)), " ",
      task ? el("a", { href: storyOf(task), title: one.id }, action) : el("b", { title: one.id ? ident(one.id) : null }, action)),
    when,
    el("p", { class: "why" },
      verdict === "allowed" ? null : el("strong", {}, verdict), verdict === "allowed" ? "" : ": ", one.reason || "no reason is on record"),
    el("p", { class: "where" },
      [one.step && `at ${one.step}`, one.direction, one.principal && `for ${person(one.principal)}`,
        one.log && `log ${one.log}`, one.revision && `policy ${String(one.revision).slice(0, 14)}`].filter(Boolean).join(" · ")),
  );
}

/** A principal in a word or two. */
export function person(principal) {
  if (!principal || typeof principal !== "object") return String(principal ?? "");
  return String(principal.sub ?? principal.name ?? principal.iss ?? plural(Object.keys(principal).length, "claim"));
}
