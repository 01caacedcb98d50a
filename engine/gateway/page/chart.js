// Small charts in SVG: lines or stacked areas of the last points, the newest at the right, gaps where nothing is known.

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 240;
const HEIGHT = 54;

// The least of 1, 1.5, 2, 3, 4, 5, 6, 8, 10, 15, 20... that is not below a value.
export function ceiling(value) {
  if (!(value > 0)) return 1;
  const ten = 10 ** Math.floor(Math.log10(value));
  return [1, 1.5, 2, 3, 4, 5, 6, 8, 10].map((step) => step * ten).find((step) => step >= value * (1 - 1e-9));
}

export class Chart {
  // lines: names of values of a point, whose colours are the classes s0, s1, s2. top: the scale's end, if that is fixed.
  // kept: points that fit. look(at): told which point somebody looks at, by pointer or arrow keys, null: at none.
  constructor(svg, scale, { title, format, lines, top, stacked, kept, look }) {
    Object.assign(this, { svg, scale, title, format, lines, top, stacked, kept, look });
    this.back = null; // how many points before the newest one somebody looks
    this.points = [];
    svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
    svg.setAttribute("preserveAspectRatio", "none");
    svg.setAttribute("role", "img");
    svg.setAttribute("tabindex", "0");
    for (const y of [0.5, HEIGHT - 0.5]) this.add("line", "floor", { x1: 0, x2: WIDTH, y1: y, y2: y });
    // The first line lies above the others, the areas below all.
    const order = lines.map((_, i) => i).reverse();
    this.areas = new Map(order.filter((i) => stacked || !i).map((i) => [i, this.add("path", `area s${i}`)]));
    this.paths = new Map(order.map((i) => [i, this.add("path", `line s${i}`)]));
    this.cross = this.add("path", "look");
    svg.addEventListener("pointermove", (event) => this.point(event));
    svg.addEventListener("pointerleave", () => this.see(null));
    svg.addEventListener("blur", () => this.see(null));
    svg.addEventListener("keydown", (event) => this.step(event));
  }

  add(tag, classes, attributes = {}) {
    const element = document.createElementNS(SVG, tag);
    element.setAttribute("class", classes);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return this.svg.appendChild(element);
  }

  draw(points) {
    this.points = points;
    const heights = this.lines.map((_, i) => points.map((point) => this.height(point, i)));
    const highest = Math.max(...heights.flat().map((value) => value ?? 0));
    const top = this.top ?? ceiling(highest);
    const y = (value) => (HEIGHT - 1 - (HEIGHT - 2) * (Math.min(value, top) / top)).toFixed(1);
    for (const [i, path] of this.paths) path.setAttribute("d", this.trace(heights[i], y));
    for (const [i, path] of this.areas) path.setAttribute("d", this.trace(heights[i], y, heights[i - 1] ?? []));
    this.scale.textContent = highest > 0 || this.top ? this.format(top) : "";
    const latest = this.lines.map((line) => points.at(-1)?.[line]);
    const told = latest.map((value, i) => (value == null ? "" : `${this.lines[i]} ${this.format(value)}`)).filter(Boolean);
    const label = `${this.title}: ${told.join(", ") || "nothing yet"}; the chart ends at ${this.format(top)}`;
    this.svg.setAttribute("aria-label", label);
  }

  // Number of the point that somebody looks at, null if nobody does.
  get at() {
    return this.back === null || this.back >= this.points.length ? null : this.points.length - 1 - this.back;
  }

  // A value as it is drawn: stacked ones stand on those before them.
  height(point, i) {
    const values = this.lines.slice(this.stacked ? 0 : i, i + 1).map((line) => point[line]);
    return values.some((value) => value == null) ? null : values.reduce((sum, value) => sum + value, 0);
  }

  x(at) {
    return WIDTH * (1 - (this.points.length - 1 - at) / (this.kept - 1));
  }

  // Path of a line, or of the area between it and `floor`, which begins anew behind each gap.
  trace(heights, y, floor = null) {
    const spot = (values, at) => `${this.x(at).toFixed(1)} ${y(values[at] ?? 0)}`;
    let path = "";
    for (const [from, to] of runs(heights)) {
      const spots = [];
      for (let at = from; at <= to; at++) spots.push(spot(heights, at));
      if (floor) for (let at = to; at >= from; at--) spots.push(spot(floor, at));
      path += `M${spots.join("L")}${floor ? "z" : from === to ? "h.1" : ""}`; // of one point alone there is a dot
    }
    return path;
  }

  point(event) {
    const box = this.svg.getBoundingClientRect();
    const back = Math.round((1 - (event.clientX - box.left) / box.width) * (this.kept - 1));
    this.see(back < this.points.length ? Math.max(0, back) : null);
  }

  step(event) {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by || !this.points.length) return;
    event.preventDefault();
    this.see(Math.max(0, Math.min(this.points.length - 1, (this.back ?? 0) - by)));
  }

  see(back) {
    this.back = back;
    this.cross.setAttribute("d", back === null ? "" : `M${(WIDTH * (1 - back / (this.kept - 1))).toFixed(1)} 0V${HEIGHT}`);
    this.look(this.at);
  }
}

// First and last places of values that follow each other without a gap.
function runs(values) {
  const found = [];
  values.forEach((value, at) => {
    if (value === null) return;
    if (found.at(-1)?.[1] === at - 1) found.at(-1)[1] = at;
    else found.push([at, at]);
  });
  return found;
}
