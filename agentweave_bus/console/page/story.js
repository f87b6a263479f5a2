// One task's story: who asked whom, on whose behalf, and all that came of it.

import { act, tell } from "./acts.js";
import { afterRest, byId, el, icon, set } from "./dom.js";
import { fetched } from "./live.js";
import { person } from "./decisions.js";
import { stateMark } from "./tasks.js";
import { timeNode } from "./clock.js";
import { agentName, amount, clock, digest, exact, ident, lasted, plural, stateOf, who } from "./words.js";
import { decideButtons } from "./waiting.js";

const ADDRESS = /^#\/task\/([^/]+)$/;
const AGAIN_MS = 4_000;
const MOST_ENTRIES = 300;
const LONG = new Set(["Message", "Task id", "Reference", "What is asked for"]);
const ICONS = {
  submitted: "sent", sent: "sent", allowed: "allowed", admitted: "allowed", denied: "denied", refused: "refused",
  step: "step", progress: "dot", nested: "sent", reissued: "again", outcome: "allowed",
  waits: "waiting",
};

export class Story {
  constructor(live) {
    this._live = live;
    this._dialog = byId("story");
    this._key = null;
    this._asking = null;
    this._last = "";
    this._timer = 0;
    const soon = afterRest(() => this._load(), 150);
    addEventListener("hashchange", () => this._go());
    this._dialog.addEventListener("close", () => this._closed());
    this._dialog.addEventListener("click", (event) => {
      if (event.target === this._dialog) this._dialog.close();
    });
    live.on(["tasks"], (state) => {
      if (this._key === null) return;
      const row = state.tasks?.find((one) => one.key === this._key && one.agent === this._row?.agent);
      if (row && this._row && (row.since !== this._row.since || row.state !== this._row.state)) soon();
    });
    live.on(["actions"], () => this._go());
  }

  _go() {
    const found = ADDRESS.exec(location.hash);
    if (found === null) {
      if (this._dialog.open) this._dialog.close();
      return;
    }
    let key = "";
    try {
      key = decodeURIComponent(found[1]);
    } catch {
      // an address that nobody here has made
    }
    if (key === this._key) return;
    this._key = key;
    this._row = null;
    this._last = "";
    this._dialog.replaceChildren(this._head(null), el("p", { class: "empty" }, "Reading its records …"));
    if (!this._dialog.open) this._dialog.showModal();
    this._dialog.scrollTop = 0;
    this._load();
  }

  _closed() {
    this._asking?.abort();
    clearTimeout(this._timer);
    this._key = null;
    this._dialog.replaceChildren();
    if (ADDRESS.test(location.hash)) history.replaceState(null, "", location.pathname);
  }

  async _load() {
    const key = this._key;
    if (key === null) return;
    this._asking?.abort();
    this._asking = new AbortController();
    clearTimeout(this._timer);
    try {
      const story = await fetched(`/api/task/${encodeURIComponent(key)}`, this._asking.signal);
      if (key !== this._key) return;
      this._row = story.row;
      const text = JSON.stringify(story);
      if (text !== this._last) this._show(story);
      this._last = text;
      if (stateOf(story.row?.state).open) this._timer = setTimeout(() => this._load(), AGAIN_MS);
    } catch (error) {
      if (error.name === "AbortError" || key !== this._key) return;
      if (this._last === "") this._dialog.replaceChildren(this._head(null), el("p", { class: "empty" }, `Its story can't be had: ${error.message}.`));
      this._timer = setTimeout(() => this._load(), AGAIN_MS);
    }
  }

  _show(story) {
    const place = this._dialog.scrollTop;
    const focused = this._dialog.contains(document.activeElement) ? document.activeElement.id : "";
    const parts = [this._head(story.row), facts(story), this._acts(story), chain(story), timeline(story)];
    this._dialog.replaceChildren(...parts.filter((one) => one !== null));
    this._dialog.scrollTop = place;
    if (focused) byId(focused)?.focus();
  }

  _head(row) {
    const state = row ? stateMark(row.state) : null;
    state?.refresh(row.state);
    return el("header", {}, state,
      el("h2", { id: "story-head" }, row ? row.capability ?? "unknown task" : "Task",
        row ? el("span", { class: "agent-of", title: row.agent }, ` at ${agentName(row.agent)}`) : null),
      el("button", { id: "story-close", type: "button", class: "close", "aria-label": "Close the story", on: { click: () => this._dialog.close() } }, icon("close")));
  }

  _acts(story) {
    const { row } = story;
    if (!this._live.state?.actions || !row || !stateOf(row.state).open) return null;
    const acts = row.state === "auth_required" ? decideButtons(this._live, row) : el("p", { class: "acts" });
    acts.append(el("button", { type: "button", class: "stop", on: { click: () => act(this._live, "cancel", row.reference, {
      title: `Cancel ${row.capability} at ${agentName(row.agent)}?`, text: `Task ${ident(row.id)}. What it has done so far is undone where the agent knows how.`,
    }) } }, "Cancel"));
    return acts;
  }
}

function facts(story) {
  const { row, principal, approval, timeline: entries = [] } = story;
  if (!row) return null;
  const revisions = [...new Set(entries.map((one) => one.revision).filter(Boolean))];
  const list = el("dl", { class: "facts" });
  const fact = (name, ...values) => {
    const long = LONG.has(name) ? "long" : null;
    list.append(el("div", { class: long }, el("dt", {}, name), el("dd", {}, ...values)));
  };
  fact("Asked by", el("span", { title: row.sender }, who(row.sender)));
  if (principal) fact("On behalf of", el("span", { title: JSON.stringify(principal) }, `${person(principal)}${principal.iss && principal.sub ? `, by ${principal.iss}` : ""}`));
  fact("First seen", el("span", { title: exact(row.at_first) }, clock(row.at_first), " (", timeNode(row.at_first), ")"));
  if (row.took_ms !== null && row.took_ms !== undefined) fact("Took", lasted(row.took_ms), row.attempt > 1 ? ` in ${row.attempt} attempts` : "");
  else fact("Attempt", String(row.attempt ?? 1));
  if (row.retry_at) fact("Tried again", timeNode(row.retry_at));
  if (revisions.length) fact(revisions.length === 1 ? "Policy" : "Policies", ...revisions.flatMap((one, i) => [i ? ", " : "", copyable(one, String(one).slice(0, 19))]));
  if (approval) fact("Approval by", el("span", { title: (approval.approvers ?? []).join("\n") }, (approval.approvers ?? []).map(who).join(", ")), " until ", timeNode(approval.until));
  if (row.message) fact("Message", row.message);
  fact("Task id", row.id ? copyable(row.id, row.id) : "not known: its first record was not seen");
  if (row.reference) fact("Reference", copyable(row.reference, row.reference));
  if (approval?.payload !== undefined) fact("What is asked for", el("code", { class: "payload" }, JSON.stringify(approval.payload)));
  return list;
}

/** Something short that stands for something long; a click copies the long one. */
function copyable(value, short) {
  return el("button", { type: "button", class: "copy", title: `${value}\nClick to copy`, "aria-label": `Copy ${value}`, on: { click: async (event) => {
    event.stopPropagation();
    try {
      await navigator.clipboard.writeText(value);
      tell("Copied.");
    } catch {
      tell("It can't be copied from here; its title shows all of it.");
    }
  } } }, el("span", {}, short), " ", icon("copy"));
}

// Who asked whom, drawn: the one on whose behalf first, then each agent, with what it was asked for.
function chain(story) {
  const links = story.chain ?? [];
  if (!links.length) return null;
  const list = el("ol", { class: "chain", "aria-label": "Who asked whom" });
  if (story.principal) {
    list.append(el("li", { class: "node person", title: JSON.stringify(story.principal) }, icon("person"), person(story.principal)),
      el("li", { class: "edge behalf" }, el("span", {}, "acts by")));
  }
  list.append(el("li", { class: "node", title: links[0].who }, who(links[0].who)));
  links.forEach((link, i) => {
    list.append(el("li", { class: "edge", title: link.id ? `id ${link.id}` : null }, el("span", {}, link.asked)),
      el("li", { class: i === links.length - 1 ? "node last" : "node", title: link.agent }, who(link.agent)));
  });
  return el("section", {}, el("h3", {}, "Who asked whom"), list);
}

function timeline(story) {
  const all = story.timeline ?? [];
  const entries = all.slice(-MOST_ENTRIES);
  const first = entries[0]?.at ?? 0;
  const list = el("ol", { class: "timeline" }, entries.map((one) => entry(one, first)));
  const left = all.length - entries.length + (story.left_out ?? 0);
  return el("section", {}, el("h3", {}, "What happened ", el("span", { class: "note" }, plural(all.length, "record"))),
    left > 0 ? el("p", { class: "note" }, `The newest ${amount(entries.length)}; ${amount(left)} older ones are left out.`) : null,
    all.length ? list : el("p", { class: "note" }, "There are no records of it on this machine, and the broker keeps none any more."),
    story.logs_whole === false ? el("p", { class: "note" }, "Not all audit logs of this machine were read: decisions may be missing here.") : null);
}

function entry(one, first) {
  const forged = one.genuine === false;
  const state = one.state ? stateOf(one.state) : null;
  const sign = forged ? "refused" : state && one.kind === "state" ? state.icon : ICONS[one.of ?? one.kind] ?? "dot";
  const passed = one.at - first;
  const node = el("li", { "data-kind": one.kind, "data-state": state?.name ?? null, "data-forged": forged, "data-depth": Math.min(one.depth ?? 0, 4) || null },
    icon(sign),
    el("time", { class: "offset", title: exact(one.at) }, passed > 0 ? `+${lasted(passed)}` : clock(one.at)),
    el("p", { class: "title" }, forged ? el("strong", {}, "Not genuine: ") : null, one.title, " ",
      el("span", { class: "by", title: one.who }, who(one.who)),
      one.attempt > 1 ? el("span", { class: "tag" }, `attempt ${one.attempt}`) : null));
  if (one.text) node.append(el("p", { class: "text" }, one.text));
  const proof = el("p", { class: "proof" });
  if (one.signed_by) proof.append(el("span", { title: one.signed_by }, `signed by ${who(one.signed_by)}`));
  if (one.digest) proof.append(copyable(one.digest, `digest ${digest(one.digest)}`));
  if (one.revision) proof.append(el("span", { title: one.revision }, `policy ${String(one.revision).slice(0, 14)}`));
  if (one.audit) proof.append(copyable(one.audit.audit_id, `audit ${one.audit.log} #${one.audit.seq ?? "?"}`));
  if (proof.childNodes.length) node.append(proof);
  return node;
}
