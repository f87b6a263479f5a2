// What is done from here, only where the console allows it: each is asked for once more before it is signed.

import { byId, el, say, set } from "./dom.js";

const LABELS = { approve: "Approve", reject: "Reject", cancel: "Cancel it", redrive: "Redrive", drop: "Drop" };
const SAID_MS = 6_000;

/**
 * Ask whether `what` shall be done to `ref`, and do it. With `silent` no reason is asked for; `row` shows that it
 * is done until the broker says so.
 */
export function act(live, what, ref, { title, text, silent = false, row = null }) {
  const dialog = byId("ask");
  const reason = silent ? null : el("input", { type: "text", name: "reason", maxlength: "1000", autocomplete: "off", placeholder: "kept with the decision" });
  const fault = el("p", { class: "fault", role: "alert" });
  const sure = el("button", { type: "submit", class: what === "approve" || what === "redrive" ? "go" : "stop" }, LABELS[what]);
  const form = el("form", { on: { submit: (event) => {
    event.preventDefault();
    send();
  } } },
  el("h2", { id: "ask-head" }, title), el("p", {}, text),
  reason && el("label", {}, "Reason ", reason), fault,
  el("p", { class: "acts" }, sure, el("button", { type: "button", class: "quiet", on: { click: () => dialog.close() } }, "Leave it")));

  async function send() {
    sure.disabled = true;
    say(fault, "");
    try {
      const answer = await fetch(`/api/act/${what}`, {
        method: "POST",
        headers: { "Content-Type": "application/json", "X-AgentWeave-Session": live.state.csrf ?? "" },
        body: JSON.stringify({ ref, reason: reason?.value ?? "" }),
      });
      const said = await answer.json().catch(() => ({}));
      if (!answer.ok) throw new Error(said.error || `the console answers ${answer.status}`);
      dialog.close();
      if (row !== null) set(row, "data-done", true);
      tell(`Done: ${said.said ?? what}.`);
    } catch (error) {
      say(fault, `Not done: ${error.message}`);
    } finally {
      sure.disabled = false;
    }
  }

  dialog.replaceChildren(form);
  dialog.showModal();
  (reason ?? sure).focus();
}

let timer = 0;

/** Say something for a while at the edge of the page. */
export function tell(text) {
  const node = byId("said");
  say(node, text);
  set(node, "data-shown", true);
  clearTimeout(timer);
  timer = setTimeout(() => set(node, "data-shown", false), SAID_MS);
}
