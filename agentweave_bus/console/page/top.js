// The head of the page: who looks, and how fresh is what is shown.

import { byId, el, icon, keyed, refreshing, say, set, changeIcon } from "./dom.js";
import { showTime, timeNode } from "./clock.js";
import { atHome, clock, plural, who } from "./words.js";

const LATE_MS = 10_000;
const SOURCES = {
  broker: { label: "broker", about: "queues, tasks, approvals and dead letters" },
  workers: { label: "workers", about: "replicas" },
  decisions: { label: "decisions", about: "decisions" },
};
const LINKS = {
  connecting: "connecting",
  live: "live",
  reconnecting: "reconnecting",
  ended: "session ended",
};

export function top(live) {
  live.on(["trust_domain", "as", "actions", "version"], (state) => {
    atHome(state.trust_domain);
    say(byId("domain"), state.trust_domain);
    document.title = `${state.trust_domain} · AgentWeave console`;
    say(byId("as"), `as ${who(state.as)}`);
    set(byId("as"), "title", state.as);
    const mode = byId("mode");
    mode.hidden = false;
    say(mode, state.actions ? "actions on" : "read-only");
    set(mode, "data-actions", state.actions === true);
    set(mode, "title", state.actions
      ? "What you approve, cancel, redrive or drop here is signed by this identity"
      : "Nothing can be changed here. Start the console with --actions to approve, cancel, redrive or drop.");
  });
  live.on(["sources", "link", "not_genuine"], (state) => show(live, state));
  byId("main").setAttribute("aria-busy", "true");
}

function show(live, state) {
  const lost = live.link !== "live" && live.link !== "connecting";
  set(document.body, "data-lost", lost);
  const link = byId("link");
  set(link, "data-link", live.link);
  say(link, LINKS[live.link]);
  const troubles = [];
  if (live.link === "ended") {
    troubles.push({ key: "link", title: "The session has ended.",
      text: "The console was started again. Open the address that it has printed.", at: live.heardAt });
  } else if (lost) {
    troubles.push({ key: "link", title: "The console does not answer.",
      text: "It is asked again until it does.", at: live.heardAt });
  }
  if (state !== null) {
    set(byId("main"), "aria-busy", "false");
    const rows = Object.entries(state.sources ?? {});
    keyed(byId("sources"), rows, ([name]) => name, source);
    for (const [name, one] of rows) {
      if (!one.ok) troubles.push({ key: name, title: `No ${SOURCES[name]?.label ?? name}.`, text: one.why, at: one.at });
    }
    const forged = state.not_genuine;
    if (forged?.count) {
      const last = forged.newest?.at(-1);
      troubles.push({ key: "forged", title: `${plural(forged.count, "record")} at the broker ${forged.count === 1 ? "is" : "are"} not genuine.`,
        text: last ? `They count nowhere. The last, of ${who(last.agent)}: ${last.why}` : "They count nowhere.", since: last?.at });
    }
    stale(state, lost, live.heardAt);
  }
  keyed(byId("troubles"), troubles, (one) => one.key, trouble);
}

function source([name]) {
  const mark = icon("up");
  const word = el("span");
  const node = el("li", { "data-source": name }, mark, word);
  return refreshing(node, ([, one]) => {
    const { label, about } = SOURCES[name] ?? { label: name, about: name };
    set(node, "data-ok", one.ok ? "yes" : "no");
    changeIcon(mark, one.ok ? "up" : "refused");
    say(word, label);
    set(node, "title", one.ok ? `${about}: as of ${clock(one.at)}` : `${about}: ${one.why}`);
    set(node, "aria-label", `${label}: ${one.ok ? "fresh" : one.why}`);
  });
}

function trouble() {
  const title = el("b");
  const text = el("span");
  const since = el("span", { class: "since", "aria-live": "off" }); // it is another each second
  const node = el("p", {}, icon("refused"), title, " ", text, " ", since);
  return refreshing(node, (one) => {
    say(title, one.title);
    say(text, one.text);
    const at = one.since ?? one.at;
    if (since.dataset.of === String(at)) return;
    since.dataset.of = at;
    if (at) since.replaceChildren(one.since ? "It came " : "What is shown is from ", timeNode(at), ".");
    else since.replaceChildren(one.since === undefined ? "Nothing was heard from there yet." : "");
  });
}

// What comes from a source that is not there is seen to be old.
function stale(state, lost, heardAt) {
  for (const panel of document.querySelectorAll("[data-from]")) {
    const one = state.sources?.[panel.dataset.from];
    mark(panel, lost || one?.ok === false || late(state, one), lost ? heardAt : one?.at);
  }
  const agents = document.querySelector(".agents-panel");
  const bad = [state.sources?.workers, state.sources?.broker].filter((one) => one?.ok === false);
  mark(agents, lost || bad.length > 0, lost ? heardAt : Math.min(...bad.map((one) => one.at)));
}

const late = (state, one) => one !== undefined && one.at > 0 && state.now - one.at > LATE_MS;

function mark(panel, old, at) {
  const note = panel.querySelector(".asof");
  set(panel, "data-stale", old);
  note.hidden = !old;
  if (!old) return;
  if (note.firstElementChild === null) note.replaceChildren("as of ", timeNode(at || NaN));
  if (at) showTime(note.firstElementChild, at);
  else note.replaceChildren("never heard");
}
