// Tasks by state, and how many a second began and ended, drawn.

import { byId, drawn, el, icon, keyed, refreshing, say, set } from "./dom.js";
import { amount, clock, plural, STATES, stateOf } from "./words.js";

const SHOWN = 117; // points in sight; the newest ones wait outside on the right and slide in
const MOVE_MS = 125;
const RECENT = 10; // a rate is the mean of so many steps
const LINES = [
  { name: "completed", label: "completed", drawn: ["area", "line"] },
  { name: "begun", label: "begun", drawn: ["line"] },
  { name: "failed", label: "failed", drawn: ["bars"] }, // rare: what did not fail draws nothing
];

export function flow(live, choose) {
  const chart = new Chart(live, byId("plot"), byId("legend"));
  live.on(["counts", "held", "dropped"], (state) => counts(state, choose));
  live.on(["flow"], (state) => chart.draw(state.flow));
}

function counts(state, choose) {
  const known = new Set(STATES.map((one) => one.name));
  const more = Object.keys(state.counts ?? {}).filter((name) => !known.has(name));
  const rows = [...STATES, ...more.map((name) => ({ ...stateOf(name), name }))];
  keyed(byId("counts"), rows.map((one) => ({ ...one, n: state.counts?.[one.name] ?? 0 })), (one) => one.name,
    (one) => countTile(one, choose));
  const let_go = state.dropped ? `, ${amount(state.dropped)} older ones let go` : "";
  say(byId("held"), `${plural(state.held ?? 0, "task")} held${let_go}`);
}

function countTile(of, choose) {
  const number = el("b");
  const tile = el("button", {
    type: "button", class: "count", "data-state": of.name, "aria-pressed": "false",
    title: `Show the tasks that are ${of.label.toLowerCase()}`, on: { click: () => choose(of.name) },
  }, number, el("span", { class: "label" }, icon(of.icon), of.label));
  return refreshing(tile, ({ n }) => {
    say(number, amount(n));
    set(tile, "data-none", n === 0);
  });
}

class Chart {
  constructor(live, plot, legend) {
    this._live = live;
    this._flow = null;
    this._last = 1;
    this._at = null;
    this._motion = matchMedia("(prefers-reduced-motion: reduce)");
    this._svg = drawn("svg", { class: "lines", preserveAspectRatio: "none", role: "img" });
    this._paths = new Map();
    for (const { name, drawn: ways } of LINES) {
      const parts = ways.map((way) => [way, drawn("path", { class: `${way} ${name}` })]);
      this._svg.append(...parts.map(([, path]) => path));
      this._paths.set(name, Object.fromEntries(parts));
    }
    this._still = el("p", { class: "still", hidden: true }, "No task began or ended in the last two minutes.");
    this._hair = el("div", { class: "hair", hidden: true });
    this._top = el("span", { class: "scale top" });
    this._half = el("span", { class: "scale half" });
    plot.append(this._top, this._half, el("div", { class: "window" }, this._svg), this._hair, this._still);
    this._plot = plot;
    this._when = el("span", { class: "when" });
    this._values = new Map();
    for (const { name, label } of LINES) {
      const value = el("b");
      this._values.set(name, value);
      legend.append(el("span", { class: `key ${name}` }, el("i"), label, " ", value));
    }
    legend.append(this._when);
    setInterval(() => this._slide(), MOVE_MS);
    plot.addEventListener("pointermove", (event) => this._point(event));
    plot.addEventListener("pointerleave", () => this._leave());
  }

  draw(said) {
    if (!said?.series) return;
    this._flow = said;
    const series = LINES.map(({ name }) => said.series[name] ?? []);
    const last = Math.max(...series.map((one) => one.length)) - 1;
    if (last < 1) return;
    const most = Math.max(...series.flat());
    const top = scaleTop(Math.max(1, most));
    this._still.hidden = most > 0;
    set(this._svg, "viewBox", `0 0 ${last} 100`);
    LINES.forEach(({ name }, index) => {
      const { line, area, bars } = this._paths.get(name);
      const ys = series[index].map((n) => 98 - (n / top) * 94);
      const curve = most ? curveOf(ys) : "";
      if (line) set(line, "d", curve);
      if (area) set(area, "d", curve && `${curve}L${last} 100L0 100Z`);
      if (bars) set(bars, "d", ys.map((y, x) => (series[index][x] ? `M${x - 0.38} 100V${Math.min(y, 93).toFixed(1)}h.76V100Z` : "")).join(""));
    });
    say(this._top, amount(top));
    say(this._half, top > 1 ? amount(top / 2) : "");
    this._last = last;
    this._slide();
    if (this._at === null) this._rates();
    else this._show();
  }

  // The picture moves left with the time, about a pixel at once. A layer of its own: nothing is painted for that.
  _slide() {
    if (this._flow === null || document.hidden) return;
    const last = this._last;
    const spare = last - (SHOWN - 1);
    const passed = (this._live.now() - this._flow.until) / this._flow.step_ms;
    const steps = this._motion.matches ? spare : Math.min(spare, Math.max(0, passed));
    this._svg.style.width = `${(last / (SHOWN - 1)) * 100}%`;
    this._svg.style.transform = `translateX(${((-steps / last) * 100).toFixed(3)}%)`;
  }

  _rates() {
    const { series, step_ms } = this._flow;
    const said = [];
    for (const { name, label } of LINES) {
      const recent = (series[name] ?? []).slice(-RECENT - 1, -1);
      const rate = recent.reduce((sum, n) => sum + n, 0) / Math.max(1, recent.length) / (step_ms / 1000);
      const text = `${rate < 10 ? rate.toFixed(1) : Math.round(rate)}/s`;
      say(this._values.get(name), text);
      said.push(`${label} ${text}`);
    }
    say(this._when, "mean of 10 s");
    set(this._svg, "aria-label", `Tasks a second over the last two minutes. Now: ${said.join(", ")}.`);
  }

  _point(event) {
    const box = this._plot.getBoundingClientRect();
    this._at = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    this._show();
  }

  _show() {
    if (this._flow === null) return;
    const { series, until, step_ms } = this._flow;
    const length = series.begun?.length ?? 0;
    const gone = Math.min(length - SHOWN, Math.max(0, (this._live.now() - until) / step_ms));
    const index = Math.min(length - 1, Math.round(gone + this._at * (SHOWN - 1)));
    for (const { name } of LINES) say(this._values.get(name), amount(series[name]?.[index] ?? 0));
    say(this._when, `in the second of ${clock(until - (length - index) * step_ms)}`);
    this._hair.hidden = false;
    this._hair.style.left = `${this._at * 100}%`;
  }

  _leave() {
    this._at = null;
    this._hair.hidden = true;
    if (this._flow !== null) this._rates();
  }
}

/** The least round number that is not below `most`. */
function scaleTop(most) {
  const power = 10 ** Math.floor(Math.log10(most));
  return [1, 2, 4, 6, 10].map((one) => one * power).find((one) => one >= most);
}

// A curve through all points that never leaves the span between two neighbours (monotone, cubic).
function curveOf(ys) {
  const n = ys.length;
  if (n < 2) return "";
  const slope = ys.map((y, i) => {
    if (i === 0 || i === n - 1) return 0;
    const before = y - ys[i - 1];
    const after = ys[i + 1] - y;
    return before * after <= 0 ? 0 : (2 * before * after) / (before + after);
  });
  let path = `M0 ${ys[0].toFixed(1)}`;
  for (let i = 1; i < n; i++) {
    const from = ys[i - 1] + slope[i - 1] / 3;
    const to = ys[i] - slope[i] / 3;
    path += `C${(i - 2 / 3).toFixed(2)} ${from.toFixed(1)} ${(i - 1 / 3).toFixed(2)} ${to.toFixed(1)} ${i} ${ys[i].toFixed(1)}`;
  }
  return path;
}
