// Each agent: its replicas and how they are, and what waits for them.

import { byId, changeIcon, el, icon, keyed, refreshing, say, set } from "./dom.js";
import { amount, lasted, memory, plural } from "./words.js";

const MOST_REPLICAS = 8;
const LATE_S = 0.5;
const SVID_SHORT_S = 300;
const UNWELL = new Set(["waiting", "given up", "ended", "silent", "deaf"]);

export function agents(live) {
  live.on(["agents", "sources"], (state) => {
    const rows = state.agents ?? [];
    const widest = Math.max(1, ...rows.flatMap((one) => one.queues.map((q) => q.pending + q.in_flight)));
    const list = byId("agents");
    set(list, "data-workers", state.sources?.workers?.ok === false ? "stale" : null);
    set(list, "data-queues", state.sources?.broker?.ok === false ? "stale" : null);
    keyed(list, rows.length ? rows.map((one) => ({ ...one, widest })) : [{ agent: "" }],
      (one) => one.agent, (one) => (one.agent ? card(one) : nobody()));
    say(byId("agents-note"), rows.length ? summary(rows) : "");
  });
}

function summary(rows) {
  const all = rows.flatMap((one) => one.replicas);
  const ready = all.filter((one) => one.state === "ready").length;
  return all.length ? `${ready} of ${plural(all.length, "replica")} ready` : plural(rows.length, "agent");
}

function nobody() {
  return el("p", { class: "empty" }, "No agent is known here yet. Start a stack with ",
    el("code", {}, "agentweave up agentweave.yaml"), ", or name its directory with ",
    el("code", {}, "--state-dir"), ".");
}

function card(of) {
  const name = el("h3", { title: of.agent });
  const ready = el("span", { class: "ready" });
  const parked = el("span", { class: "tag wait", hidden: true, title: "Tasks that wait for an answer, an approval or their time" });
  const letters = el("a", { class: "tag bad", href: "#letters-head", hidden: true });
  const replicas = el("tbody");
  const heads = ["Replica", "Up", "Memory", "Lag", "Busy", "SVID"];
  const table = el("table", { class: "replicas" }, el("caption", { class: "unseen" }, `Replicas of ${of.name}`),
    el("thead", {}, el("tr", {}, heads.map((one, i) => el("th", { scope: "col", class: i ? "num" : null }, one)))),
    replicas);
  const more = el("p", { class: "more", hidden: true });
  const queues = el("ul", { class: "queues", "aria-label": `Queues of ${of.name}` });
  const node = el("article", { class: "agent", "aria-label": of.name },
    el("header", {}, name, ready, parked, letters), table, more, queues);
  return refreshing(node, (one) => {
    say(name, one.name);
    const well = one.replicas.filter((r) => r.state === "ready").length;
    say(ready, one.replicas.length ? `${well}/${one.replicas.length} ready` : "no replica here");
    set(ready, "data-short", well < one.replicas.length);
    badge(parked, one.parked, `${amount(one.parked)} parked`);
    badge(letters, one.letters, plural(one.letters, "dead letter"));
    table.hidden = one.replicas.length === 0;
    const sorted = [...one.replicas].sort((a, b) => Number(b.state !== "ready") - Number(a.state !== "ready"));
    keyed(replicas, sorted.slice(0, MOST_REPLICAS), (r) => r.name, replica);
    more.hidden = sorted.length <= MOST_REPLICAS;
    say(more, `and ${sorted.length - MOST_REPLICAS} more, all ready`.replace(
      ", all ready", sorted.slice(MOST_REPLICAS).every((r) => r.state === "ready") ? ", all ready" : ""));
    showQueues(queues, one);
  });
}

function badge(node, n, text) {
  node.hidden = !n;
  say(node, text);
}

function replica(of) {
  const mark = icon("up");
  const name = el("span", { class: "name" });
  const state = el("span", { class: "word" });
  const pid = el("span", { class: "pid" });
  const cells = ["up", "memory", "lag", "busy", "svid"].map((one) => el("td", { class: `num ${one}` }));
  const [up, resident, lag, busy, svid] = cells;
  const row = el("tr", {}, el("th", { scope: "row" }, mark, name, " ", pid, " ", state), cells);
  return refreshing(row, (one) => {
    const beat = one.beat;
    set(row, "data-state", one.state);
    changeIcon(mark, one.state === "ready" ? "up" : UNWELL.has(one.state) ? "down" : "submitted");
    say(name, one.name);
    set(name, "title", one.up_s === null ? one.name : `${one.name}, up for ${lasted(one.up_s * 1000)}`);
    say(pid, one.pid === null ? "" : one.pid);
    set(pid, "title", "process id");
    say(state, said(one));
    set(state, "title", one.why || null);
    say(up, one.up_s === null ? "–" : lasted(one.up_s * 1000));
    say(resident, memory(beat?.resident));
    say(lag, beat ? lasted(beat.lag_s * 1000) : "–");
    set(lag, "data-bad", (beat?.lag_s ?? 0) > LATE_S);
    set(lag, "title", "By how much its event loop is late");
    say(busy, beat ? beat.in_flight : "–");
    set(busy, "title", beat ? `${beat.in_flight} in flight, ${amount(beat.handled)} handled` : null);
    say(svid, !beat ? "–" : beat.svid_s === null ? "none" : lasted(beat.svid_s * 1000));
    set(svid, "title", "For how long its identity is still valid");
    set(svid, "data-bad", Boolean(beat) && (beat.svid_s ?? 0) < SVID_SHORT_S);
  });
}

function said(one) {
  const parts = [];
  if (one.state !== "ready") parts.push(one.state);
  if (one.state === "ready" && one.beat?.connected === false) parts.push("not connected");
  if (one.restarts) parts.push(plural(one.restarts, "restart"));
  if (one.why) parts.push(one.why);
  return parts.join(" · ");
}

function showQueues(list, one) {
  const busy = one.queues.filter((q) => q.pending || q.in_flight || q.redelivered);
  const quiet = one.queues.filter((q) => !busy.includes(q)).map((q) => q.capability);
  const rows = busy.map((q) => ({ ...q, widest: one.widest }));
  if (quiet.length) rows.push({ capability: "\u0000quiet", quiet });
  keyed(list, rows, (q) => q.capability, (q) => (q.quiet ? quietOnes() : queue()));
}

function quietOnes() {
  const node = el("li", { class: "quiet" });
  return refreshing(node, ({ quiet }) => {
    const text = `nothing waits for ${quiet.join(", ")}`;
    say(node, text);
    set(node, "title", text);
  });
}

function queue() {
  const name = el("span", { class: "name" });
  const flying = el("i", { class: "flying" });
  const pending = el("i", { class: "pending" });
  const numbers = el("span", { class: "numbers" });
  const more = el("span");
  const again = el("span", { class: "again" }, icon("again", "redelivered"), more);
  const node = el("li", {}, name, el("span", { class: "bar", "aria-hidden": "true" }, flying, pending),
    el("span", { class: "figures" }, again, numbers));
  return refreshing(node, (q) => {
    say(name, q.capability);
    set(name, "title", q.capability);
    // By the square root: one that waits can be seen beside thousands.
    const part = (n) => `${Math.sqrt(n / q.widest) * 100}%`;
    const all = q.in_flight + q.pending;
    flying.style.width = all ? `calc(${part(all)} * ${q.in_flight / all})` : "0";
    pending.style.width = all ? `calc(${part(all)} * ${q.pending / all})` : "0";
    say(numbers, `${amount(q.pending)} waiting, ${amount(q.in_flight)} in flight`);
    again.hidden = !q.redelivered;
    say(more, amount(q.redelivered));
    set(again, "title", `${amount(q.redelivered)} of them redelivered`);
  });
}
