// What the server says, as it says it: one snapshot, then the sections that have changed.

import { inNextFrame } from "./dom.js";

const HIDDEN_MS = 60_000;
const AGAIN_MS = 1_000;
const SILENT_MS = 15_000; // the flow changes every second: who says nothing for so long is not there

/** The newest of everything; `on` names what is to be drawn when one of its sections has changed. */
export class Live {
  constructor() {
    this.state = null;
    this.link = "connecting";
    this.heardAt = 0;
    this._skew = 0;
    this._listeners = [];
    this._changed = new Set();
    this._draw = inNextFrame(() => this._tell());
    this._source = null;
    this._timer = 0;
    this._watch = 0;
  }

  /** The server's clock. */
  now() {
    return Date.now() + this._skew;
  }

  on(sections, draw) {
    this._listeners.push({ sections, draw });
  }

  /** Have the parts that show these sections drawn again. */
  touch(...sections) {
    for (const one of sections) this._changed.add(one);
    this._draw();
  }

  open() {
    if (this._source !== null) return;
    const source = new EventSource("/api/events");
    this._source = source;
    source.addEventListener("state", (event) => this._heard(JSON.parse(event.data), true));
    source.addEventListener("change", (event) => this._heard(JSON.parse(event.data), false));
    source.addEventListener("error", () => this._broken(source));
    this.heardAt = Date.now();
    clearInterval(this._watch);
    this._watch = setInterval(() => {
      if (Date.now() - this.heardAt > SILENT_MS) this._broken(source);
    }, SILENT_MS / 3);
    // A tab that nobody looks at takes no place among the few streams of the server.
    document.onvisibilitychange = () => {
      clearTimeout(this._timer);
      if (document.hidden) this._timer = setTimeout(() => this.close(), HIDDEN_MS);
      else if (this.link !== "ended") this.open();
    };
  }

  close() {
    clearInterval(this._watch);
    this._source?.close();
    this._source = null;
  }

  _heard(said, whole) {
    this.heardAt = Date.now();
    if (Number.isFinite(said.now)) this._skew = said.now - Date.now();
    if (whole) this.state = said;
    else if (this.state === null) return;
    else Object.assign(this.state, said);
    this._linked("live");
    this.touch(...Object.keys(said));
  }

  // The browser's own pause before it tries again is long. An answer that is no stream (the session is over, or
  // all places are taken) says by its status which of them it is.
  async _broken(source) {
    const refused = source.readyState === EventSource.CLOSED;
    if (this._source !== source) {
      source.close();
      return;
    }
    this.close();
    const ended = refused && (await this._hasEnded());
    this._linked(ended ? "ended" : "reconnecting");
    clearTimeout(this._timer);
    if (!ended) this._timer = setTimeout(() => this.open(), AGAIN_MS);
  }

  async _hasEnded() {
    try {
      const answer = await fetch("/api/state", { cache: "no-store" });
      return answer.status === 401 || answer.status === 403;
    } catch {
      return false; // nobody answers there, as when the stream broke
    }
  }

  _linked(link) {
    if (this.link === link) return;
    this.link = link;
    this.touch("link");
  }

  _tell() {
    const changed = this._changed;
    this._changed = new Set();
    for (const { sections, draw } of this._listeners) {
      if ((this.state !== null || sections.includes("link")) && sections.some((one) => changed.has(one))) {
        draw(this.state);
      }
    }
  }
}

/** Ask for JSON. Raises an Error whose message can be shown. */
export async function fetched(path, signal) {
  let answer;
  try {
    answer = await fetch(path, { cache: "no-store", signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("the console does not answer");
  }
  const said = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(said.error || `the console answers ${answer.status}`);
  return said;
}
