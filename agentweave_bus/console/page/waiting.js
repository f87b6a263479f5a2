// What waits for a person: approvals, and dead letters.

import { act } from "./acts.js";
import { showTime, timeNode } from "./clock.js";
import { byId, el, icon, keyed, refreshing, say, set } from "./dom.js";
import { storyOf } from "./tasks.js";
import { agentName, amount, ident, who } from "./words.js";

const NO_LETTER = "No dead letter. A task that is given up after its last attempt comes here, with the reason.";

export function waiting(live) {
  live.on(["approvals", "actions"], (state) => approvals(live, state));
  live.on(["letters", "letters_more", "letters_why", "actions"], (state) => letters(live, state));
}

function approvals(live, state) {
  const rows = state.approvals ?? [];
  say(byId("approvals-note"), rows.length ? `${amount(rows.length)} waiting` : "");
  keyed(byId("approvals"), rows.length ? rows : [{ key: "" }], (one) => `${one.state} ${one.agent} ${one.key}`,
    (one) => (one.key ? approval(one, live) : el("li", { class: "empty" }, "Nothing waits for an approval.")));
}

function approval(of, live) {
  const what = el("a", { href: storyOf(of.key), class: "what" });
  const agent = el("span", { class: "agent-of" });
  const since = timeNode(of.since);
  const until = timeNode(of.until);
  const detail = el("p", { class: "detail" });
  const row = el("li", { "data-state": of.state }, icon("waiting"),
    el("p", { class: "line" }, what, " ", agent), since, detail,
    el("p", { class: "detail faint" }, el("span", { class: "by" }), until));
  const by = row.querySelector(".by");
  if (live.state.actions && of.state === "auth_required") row.append(decideButtons(live, of, row));
  return refreshing(row, (one) => {
    say(what, one.capability ?? "unknown task");
    say(agent, `at ${agentName(one.agent)}`);
    set(agent, "title", one.agent);
    showTime(since, one.since);
    showTime(until, one.until);
    say(detail, `asked by ${who(one.sender)}${one.message ? `: ${one.message}` : ""}`);
    set(detail, "title", one.sender);
    const names = one.approvers ?? [];
    say(by, `${names.length ? `waits for ${names.map(who).join(", ")}` : "waits for input"}${one.until ? " · ends " : ""}`);
    set(by, "title", names.join("\n"));
  });
}

/** The two answers to who asks for an approval; `row` shows that one was given. */
export function decideButtons(live, of, row = null) {
  const what = `${of.capability} at ${agentName(of.agent)}`;
  return el("p", { class: "acts" },
    el("button", { type: "button", class: "go", on: { click: () => act(live, "approve", of.reference, {
      title: `Approve ${what}?`, text: `It was asked by ${who(of.sender)}, task ${ident(of.id)}. It begins at once, and your decision is signed and kept.`, row,
    }) } }, "Approve"),
    el("button", { type: "button", class: "stop", on: { click: () => act(live, "reject", of.reference, {
      title: `Reject ${what}?`, text: `It was asked by ${who(of.sender)}, task ${ident(of.id)}. It ends as rejected, and who asked is told why.`, row,
    }) } }, "Reject"));
}

function letters(live, state) {
  const rows = state.letters ?? [];
  say(byId("letters-note"), rows.length ? `${amount(rows.length)}${state.letters_more ? "+" : ""}` : "");
  const why = state.letters_why;
  const told = why ? [{ letter: "", text: `They are not known: ${why}` }] : [];
  keyed(byId("letters"), rows.length || why ? [...told, ...rows] : [{ letter: "", text: NO_LETTER }],
    (one) => one.letter, (one) => (one.letter ? letter(one, live) : said()));
}

function said() {
  const node = el("li", { class: "empty" });
  return refreshing(node, ({ text }) => say(node, text));
}

function letter(of, live) {
  const [agent, place = ""] = of.letter.split("#");
  const [capability, slot = ""] = place.split("/");
  const key = slot.split(".")[0];
  const reason = el("p", { class: "why", title: of.reason }, of.reason);
  const state = el("span", { class: "tag" });
  const more = el("p", { class: "detail faint" });
  const what = of.task || key ? el("a", { href: storyOf(key), class: "what" }, capability) : el("b", {}, capability);
  const row = el("li", { "data-state": "failed" }, icon("failed"),
    el("p", { class: "line" }, what, " ", el("span", { class: "agent-of", title: agent }, `at ${agentName(agent)}`), " ", state),
    timeNode(of.given_up_at), reason, more);
  const acts = live.state.actions ? letterButtons(live, of, row, `${capability} at ${agentName(agent)}`) : null;
  if (acts) row.append(acts);
  return refreshing(row, (one) => {
    const plain = one.state === "waiting";
    state.hidden = plain;
    say(state, one.state);
    const sender = one.task?.sender ?? one.event?.publisher;
    const parts = [sender && `from ${who(sender)}`, one.attempts !== undefined && `${one.attempts} attempts`,
      one.task && ident(one.task.id), one.event?.name && `event ${one.event.name}`];
    say(more, parts.filter(Boolean).join(" · "));
    set(more, "title", one.letter);
    if (acts) acts.firstChild.hidden = !plain;
  });
}

function letterButtons(live, of, row, what) {
  return el("p", { class: "acts" },
    el("button", { type: "button", class: "go", on: { click: () => act(live, "redrive", of.letter, {
      title: `Redrive ${what}?`, text: `The task begins anew. It was given up because: ${of.reason}`, silent: true, row,
    }) } }, "Redrive"),
    el("button", { type: "button", class: "stop", on: { click: () => act(live, "drop", of.letter, {
      title: `Drop ${what}?`, text: `It is put on record that it is dealt with, and listed no more. It was given up because: ${of.reason}`, row,
    }) } }, "Drop"));
}
