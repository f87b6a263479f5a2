// How things are said: names of states, shortened identities, times and amounts.

// Characters that would hide, reorder or break what stands beside them are written out.
const UNSEEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g;
const MOST = 4000;

/** What of a text is shown: all of it that can be seen, and the rest by its number. */
export function shown(value) {
  const text = String(value ?? "");
  const cut = text.length > MOST ? `${text.slice(0, MOST)} …` : text;
  return cut.replace(UNSEEN, (one) => `\\u${one.charCodeAt(0).toString(16).padStart(4, "0")}`);
}

export const STATES = [
  { name: "submitted", label: "Submitted", icon: "submitted", open: true },
  { name: "working", label: "Working", icon: "working", open: true },
  { name: "input_required", label: "Needs input", icon: "waiting", open: true },
  { name: "auth_required", label: "Needs approval", icon: "waiting", open: true },
  { name: "completed", label: "Completed", icon: "completed", open: false },
  { name: "failed", label: "Failed", icon: "failed", open: false },
  { name: "canceled", label: "Canceled", icon: "canceled", open: false },
  { name: "rejected", label: "Rejected", icon: "rejected", open: false },
];
const BY_NAME = new Map(STATES.map((one) => [one.name, one]));

/** What is known of a state; one that this page does not know is shown by its own name. */
export const stateOf = (name) =>
  BY_NAME.get(name) ?? { name: "unknown", label: shown(name || "unknown"), icon: "dot", open: true };

let home = "";
/** Identities of this trust domain are shown without it. */
export function atHome(domain) {
  home = `spiffe://${domain}/`;
}

export function who(id) {
  const text = String(id ?? "");
  if (!text) return "unknown";
  return text.startsWith(home) ? text.slice(home.length) : text.replace(/^spiffe:\/\//, "");
}

/** An agent by the last part of its identity. */
export const agentName = (id) => who(id).replace(/^agent\//, "");

/** The first characters of a digest. */
export const digest = (text) => String(text ?? "").slice(0, 10);

/** An id is told from others best by its end: UUIDv7 of one moment begin alike. */
export function ident(text) {
  const id = String(text ?? "");
  return id.length > 14 ? `…${id.slice(-12)}` : id;
}

export function lasted(ms) {
  if (ms === null || ms === undefined) return "";
  if (ms < 0) return `−${lasted(-ms)}`;
  if (ms < 1000) return `${Math.round(ms)} ms`;
  const s = ms / 1000;
  if (s < 9.95) return `${s.toFixed(1)} s`;
  if (s < 99.5) return `${Math.round(s)} s`;
  const m = s / 60;
  if (m < 99.5) return `${Math.round(m)} min`;
  const h = m / 60;
  return h < 47.5 ? `${Math.round(h)} h` : `${Math.round(h / 24)} d`;
}

export function ago(at, now) {
  const past = now - at;
  if (past < 0) return past > -1500 ? "now" : `in ${lasted(-past)}`;
  return past < 1500 ? "now" : `${lasted(Math.max(1000, Math.floor(past / 1000) * 1000)).replace(/\.0 s/, " s")} ago`;
}

const CLOCK = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const EXACT = new Intl.DateTimeFormat("en-GB", {
  year: "numeric", month: "short", day: "numeric", hour: "2-digit", minute: "2-digit", second: "2-digit",
  fractionalSecondDigits: 3, timeZoneName: "short",
});
const possible = (at) => Number.isFinite(at) && Math.abs(at) < 8.64e15;
export const clock = (at) => (possible(at) ? CLOCK.format(at) : "?");
export const exact = (at) => (possible(at) ? EXACT.format(at) : "at an unknown time");

export function amount(n) {
  if (n === null || n === undefined) return "–";
  if (n < 100_000) return n.toLocaleString("en-US");
  return n < 9_950_000 ? `${(n / 1e3).toLocaleString("en-US", { maximumFractionDigits: 0 })} k`
    : `${(n / 1e6).toFixed(1)} M`;
}

export const memory = (bytes) => (bytes ? `${Math.round(bytes / 1048576)} MB` : "–");
export const plural = (n, one, many = `${one}s`) => `${amount(n)} ${n === 1 ? one : many}`;
