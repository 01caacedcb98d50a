// Figures of the server: asked for once a second while somebody looks, drawn over the last two minutes.

import { Chart } from "./chart.js";
import { served } from "./door.js";
import { duration, percent, rate, uptime, whole } from "./units.js";

const EVERY_MS = 1000;
const SLOWEST_MS = 8000; // between two tries of a server that does not answer
const PATIENCE_MS = 5000;
const KEPT = 120; // points of a chart
const RECENT = 30; // points whose durations make a percentile

const byId = (id) => document.getElementById(id);

// As engine/gateway/state.py does it.
export function percentile(counts, bounds, share) {
  const total = counts.reduce((sum, count) => sum + count, 0);
  if (!total) return null;
  let before = 0;
  for (let i = 0; i < bounds.length; i++) {
    const upto = before + counts[i];
    const below = i ? bounds[i - 1] : 0;
    if (counts[i] && upto >= share * total) {
      return below + ((bounds[i] - below) * (share * total - before)) / counts[i];
    }
    before = upto;
  }
  return bounds.at(-1);
}

const SHARES = { p50: 0.5, p90: 0.9, p99: 0.99 };
const TILES = {
  out: { title: "Tokens out per second", format: rate, lines: ["out"] },
  in: { title: "Tokens in per second", format: rate, lines: ["in"] },
  work: { title: "Sequences", format: whole, lines: ["running", "waiting"] },
  kv: { title: "KV cache", format: percent, lines: ["used", "kept"], top: 1, stacked: true },
  first: { title: "Time to first token", format: duration, lines: Object.keys(SHARES) },
  between: { title: "Time between tokens", format: duration, lines: Object.keys(SHARES) },
};

export class Live {
  // headers: a function that gives those of a request. show(state, notes): told of each state, or of why there is none.
  constructor(headers, show) {
    this.headers = headers;
    this.show = show;
    this.last = null;
    this.states = []; // the last ones, of which percentiles of late are made
    this.points = [];
    this.pause = EVERY_MS;
    this.timer = 0;
    this.charts = Object.entries(TILES).map(([name, tile]) => new Tile(name, tile));
    document.addEventListener("visibilitychange", () => this.hurry());
  }

  start() {
    this.ask();
  }

  // Ask now: the key is another one, or somebody looks again.
  hurry() {
    clearTimeout(this.timer);
    this.asking?.abort();
    if (!document.hidden) this.ask();
  }

  async ask() {
    const asking = (this.asking = new AbortController());
    const late = setTimeout(() => asking.abort("late"), PATIENCE_MS);
    try {
      const response = await fetch("page/state", { headers: this.headers(), signal: asking.signal, cache: "no-store" });
      if (response.ok) this.take(await response.json());
      else await this.refused(response);
    } catch {
      if (asking !== this.asking || (asking.signal.aborted && asking.signal.reason !== "late")) return;
      this.lost();
    } finally {
      clearTimeout(late);
    }
    if (asking === this.asking && !document.hidden) this.timer = setTimeout(() => this.ask(), this.pause);
  }

  take(state) {
    this.pause = EVERY_MS;
    const before = this.last;
    this.last = state;
    if (before && state.uptime_s < before.uptime_s) this.states = []; // another server, whose counters began anew
    this.states = [...this.states, state].slice(-RECENT - 1);
    this.push(pointOf(state, before, this.states[0]));
    for (const cell of document.querySelectorAll("[data-of]")) {
      const value = state[cell.dataset.of];
      cell.textContent = cell.dataset.of === "uptime_s" ? uptime(value) : whole(value);
    }
    document.querySelector("[data-of=restarts]").classList.toggle("marked", state.restarts > 0);
    this.tenants(state.tenants);
    this.figures(null);
    this.show(state, state.notes ?? []);
  }

  async refused(response) {
    this.pause = Math.min(2 * this.pause, SLOWEST_MS);
    this.push(null);
    if (response.status === 401) {
      this.figures("Figures are shown to whoever has a key.");
      const isGiven = "authorization" in this.headers();
      const why = isGiven ? "This server does not know this key" : "This server asks for a key";
      return this.show({ state: "asks for a key" }, [`${why}: enter one above, under “Key”.`]);
    }
    if (response.status === 403) {
      this.figures("This key has no right to the server’s figures.");
      const model = await served(this.headers());
      return this.show({ state: "reached", model, model_id: model }, []);
    }
    this.show({ state: "out of reach" }, [`The server’s figures cannot be had: it answers with status ${response.status}.`]);
  }

  lost() {
    this.pause = Math.min(2 * this.pause, SLOWEST_MS);
    this.push(null);
    this.show({ state: "out of reach" }, ["The server does not answer. This page goes on asking."]);
  }

  push(point) {
    if (!point) this.states = []; // "of late" begins anew behind what is not known
    this.points = [...this.points, point].slice(-KEPT);
    for (const tile of this.charts) tile.draw(this.points, this.last);
  }

  figures(why) {
    byId("no-figures").hidden = !why;
    byId("no-figures").textContent = why ?? "";
    byId("figures").hidden = Boolean(why);
  }

  tenants(tenants) {
    const table = byId("tenants");
    table.hidden = !tenants?.length;
    if (table.hidden) return;
    const rows = [...tenants].sort((one, other) => other.output_tokens - one.output_tokens);
    table.tBodies[0].replaceChildren(
      ...rows.map((tenant) => {
        const row = document.createElement("tr");
        const numbers = [tenant.requests, tenant.prompt_tokens, tenant.output_tokens].map(whole);
        for (const text of [tenant.name, ...numbers]) row.insertCell().textContent = text;
        return row;
      }),
    );
  }
}

// What the charts draw of a state. before: the one before it, if there is one; first: that from which "of late" counts.
function pointOf(state, before, first) {
  const seconds = before ? state.uptime_s - before.uptime_s : 0;
  const perSecond = (name) => {
    const grown = before ? state[name] - before[name] : -1;
    return seconds > 0 && grown >= 0 ? grown / seconds : null; // counters of a core fall when it dies
  };
  return {
    time: state.uptime_s,
    out: { out: perSecond("output_tokens") },
    in: { in: perSecond("prompt_tokens") },
    work: { running: state.running, waiting: state.waiting },
    kv: { used: state.kv_used_share, kept: state.kv_cached_share },
    first: percentiles(state, first, "first_token_s"),
    between: percentiles(state, first, "inter_token_s"),
  };
}

function percentiles(state, first, name) {
  if (!state[name]) return {};
  const counts = state[name].counts.map((count, i) => Math.max(0, count - first[name].counts[i]));
  const entries = Object.entries(SHARES);
  return Object.fromEntries(entries.map(([key, share]) => [key, percentile(counts, state.latency_bounds_s, share)]));
}

// Figures and chart of one quantity.
class Tile {
  constructor(name, { title, format, lines, top, stacked }) {
    const element = byId(`tile-${name}`);
    this.name = name;
    this.lines = lines;
    this.format = format;
    this.values = [...element.querySelectorAll(".figure b")];
    this.when = element.querySelector("small");
    if (lines.length > 1) element.querySelectorAll(".figure span").forEach((span, i) => span.classList.add(`s${i}`));
    this.points = this.times = [];
    const look = (at) => this.write(at);
    const [svg, scale] = [element.querySelector("svg"), element.querySelector(".scale")];
    this.chart = new Chart(svg, scale, { title, format, lines, top, stacked, kept: KEPT, look });
  }

  draw(points, state) {
    this.state = state;
    this.times = points.map((point) => point?.time);
    this.points = points.map((point) => point?.[this.name] ?? {});
    this.chart.draw(this.points);
    this.write(this.chart.at);
  }

  // Write the values of a point that somebody looks at, else the latest ones; where there were no durations of late,
  // the percentiles of all since the start.
  write(at) {
    let point = this.points[at ?? this.points.length - 1] ?? {};
    let when = "";
    if (at !== null) {
      const seconds = this.times.at(-1) - this.times[at];
      when = Number.isNaN(seconds) ? "not known" : seconds ? `${Math.round(seconds)} s ago` : "now";
    } else if (this.state?.latency_bounds_s && this.lines[0] === "p50") {
      const isOfLate = point.p50 != null;
      if (!isOfLate) point = this.state[`${this.name === "first" ? "first" : "inter"}_token_s`];
      when = isOfLate ? `last ${RECENT} s` : point.p50 == null ? "" : "since the start";
    }
    this.when.textContent = when;
    this.values.forEach((value, i) => {
      const number = point[this.lines[i]];
      value.textContent = number == null ? "–" : this.format(number);
    });
  }
}
