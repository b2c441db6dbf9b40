"use strict";
// Draws sweep.html from the JSON in the page. All text comes in as text nodes: nothing of a config is ever markup.

const LARGEST = 1e300; // beyond it the differences that charts take are infinite
const drawable = (_, value) => (typeof value === "number" ? Math.max(-LARGEST, Math.min(LARGEST, value)) : value);
const data = JSON.parse(document.getElementById("data").textContent, drawable);
const byNumber = new Map(data.trials.map((trial) => [trial.number, trial]));
const valued = data.trials.filter((trial) => trial.best !== null);
const sign = data.mode === "max" ? 1 : -1;
const at = (id) => document.getElementById(id);
const MANY = 60; // trials, of which lines are drawn thinner
let zoomed = false;

// ---- elements

function node(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

function shape(tag, attributes = {}, ...children) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) if (value !== null) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function label(x, y, text, anchor = "middle", kind = null) {
  return shape("text", { x, y, "text-anchor": anchor, class: kind }, text);
}

function canvas(host, height, title) {
  const width = Math.max(260, host.clientWidth);
  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": title });
  svg.classList.toggle("many", data.trials.length > MANY);
  host.replaceChildren(svg);
  return [svg, width];
}

// ---- numbers

function short(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e5 || size < 1e-4) return value.toExponential(1).replace(".0e", "e").replace("e+", "e");
  return String(Number(value.toPrecision(size >= 1000 ? 5 : 3)));
}

function precise(value) {
  return typeof value === "number" ? String(Number(value.toPrecision(4))) : short(value);
}

function span(seconds) {
  const whole = Math.round(seconds);
  if (whole < 60) return `${seconds < 10 ? Number(seconds.toFixed(1)) : whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${Math.floor(whole / 3600)} h ${Math.round((whole % 3600) / 60)} min`;
}

function scale(low, high, start, end, log = false) {
  const f = log ? Math.log10 : (value) => value;
  if (f(high) === f(low)) return () => (start + end) / 2;
  return (value) => start + ((f(value) - f(low)) / (f(high) - f(low))) * (end - start);
}

function ticks(low, high, count, log = false) {
  if (log && high / low > 1) {
    const decades = Math.log10(high / low);
    const mantissas = decades > 2.2 ? [1] : decades > 1 ? [1, 3] : [1, 2, 5];
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
      for (const m of mantissas) found.push(Number(`${m}e${power}`));
    const inside = found.filter((v) => v >= low * 0.999 && v <= high * 1.001);
    const every = Math.ceil(inside.length / (count + 1));
    if (inside.length > 1) return inside.filter((_, i) => i % every === 0);
  }
  if (high <= low) return [low];
  const raw = (high - low) / count;
  const base = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * base).find((s) => s >= raw * 0.999);
  if (low + step === low || high - step === high) return [low, high]; // too close for floats: no tick lies between
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(Number((i * step).toPrecision(12)));
  return found;
}

// Not Math.min(...values): a hundred thousand arguments overflow the stack.
function ends(values) {
  return values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
}

function padded(values, log = false, share = 0.05) {
  const [low, high] = ends(values);
  if (log) {
    const room = Math.max((high / low) ** share, 1.02);
    return [low / room, high * room];
  }
  const room = (high - low || Math.abs(high) || 1) * share;
  return [low - room, high + room];
}

// ---- colours: by rank, for the values of good trials lie close together

const ranks = new Map();
[...valued].sort((a, b) => sign * (a.best - b.best)).forEach((trial, i, all) => {
  ranks.set(trial.number, all.length > 1 ? i / (all.length - 1) : 1);
});

function variable(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function parts(name) {
  return variable(name).match(/[0-9a-f]{2}/gi).map((digits) => parseInt(digits, 16));
}

function mixed(from, to, share) {
  return from.map((part, i) => Math.round(part + (to[i] - part) * share));
}

// share of the ranks, 0 the worst; strength below 1 lets the card through, without being transparent
function ramp() {
  const stops = [0, 1, 2, 3, 4].map((i) => parts(`--ramp${i}`)), card = parts("--card");
  return (share, strength = 1) => {
    const place = Math.min(3.9999, Math.max(0, share * 4));
    return `rgb(${mixed(card, mixed(stops[Math.floor(place)], stops[Math.floor(place) + 1], place % 1), strength).join(",")})`;
  };
}

function tint(trial, colours) {
  return ranks.has(trial.number) ? colours(ranks.get(trial.number)) : variable("--stopped");
}

function ranked(trials) {
  return [...trials].sort((a, b) => (ranks.get(a.number) ?? -1) - (ranks.get(b.number) ?? -1));
}

function kindOf(trial) {
  return trial.number === data.best ? " best-line" : trial.state === "stopped" ? " stopped-line" : "";
}

// ---- charts

function drawCurves() {
  const [svg, width] = canvas(at("curves"), width_of("curves") < 500 ? 280 : 380, "Learning curves of all trials");
  const height = Number(svg.getAttribute("height")), box = { left: 50, right: width - 14, top: 12, bottom: height - 38 };
  const shown = data.trials.filter((t) => t.curve.some((p) => p[1] !== null));
  if (!shown.length) return svg.append(label(width / 2, height / 2, "no trial has been evaluated yet"));
  let values = shown.flatMap((t) => t.curve.map((p) => p[1])).filter((v) => v !== null);
  const [least, most] = ends(values), log = data.mode === "min" && least > 0 && most / least > 50;
  if (zoomed) {
    const cut = [...valued].map((t) => sign * t.best).sort((a, b) => a - b)[Math.floor(valued.length * 0.6)];
    const inside = values.filter((v) => sign * v >= cut);
    if (inside.length > 1) values = inside;
  }
  const [low, high] = padded(values, log);
  const last = Math.max(data.num_epochs, ...shown.map((t) => t.epoch));
  const first = Math.min(...shown.map((t) => t.curve[0][0]));
  const x = scale(Math.min(first, last - 1), last, box.left, box.right), y = scale(low, high, box.bottom, box.top, log);
  frame(svg, box, x, y, ticks(first, last, Math.min(10, last)).filter(Number.isInteger), ticks(low, high, 5, log));
  svg.append(label((box.left + box.right) / 2, height - 4, "epoch"));
  svg.append(shape("clipPath", { id: "inside" }, shape("rect", { x: box.left - 4, y: box.top - 4, width: box.right - box.left + 10, height: box.bottom - box.top + 8 })));
  const inside = shape("g", { "clip-path": "url(#inside)" });
  svg.append(inside);
  const colours = ramp();
  for (const trial of ranked(shown).sort((a, b) => (a.number === data.best) - (b.number === data.best))) {
    const stroke = trial.number === data.best ? variable("--best") : trial.state === "failed" ? variable("--failed") : tint(trial, colours);
    const points = trial.curve.filter((p) => p[1] !== null).map((p) => [x(p[0]), y(p[1])]);
    const path = points.map((p, i) => `${i ? "L" : "M"}${p[0].toFixed(1)},${p[1].toFixed(1)}`).join("");
    const own = { "data-trial": trial.number };
    inside.append(shape("path", { ...own, d: path, stroke, class: "line" + kindOf(trial) }));
    const [ex, ey] = points[points.length - 1];
    if (trial.state === "failed") inside.append(shape("path", { ...own, class: "line", stroke, d: `M${ex - 4},${ey - 4}l8,8m0,-8l-8,8` }));
    else inside.append(shape("circle", { ...own, class: "dot" + (trial.state === "stopped" ? " stopped-line" : ""), cx: ex, cy: ey, r: trial.number === data.best ? 5 : 3.4, fill: stroke }));
    for (const [epoch] of trial.clones) {
      const near = trial.curve.find((p) => p[0] >= epoch && p[1] !== null);
      if (near) inside.append(shape("circle", { ...own, class: "dot", cx: x(near[0]), cy: y(near[1]), r: 3, fill: variable("--ink") }));
    }
    inside.append(shape("path", { ...own, d: path + "h0.01", class: "reach" }));
  }
}

function width_of(id) {
  return at(id).clientWidth;
}

function frame(svg, box, x, y, xTicks, yTicks, format = short) {
  for (const tick of yTicks) {
    svg.append(shape("line", { class: "grid", x1: box.left, x2: box.right, y1: y(tick), y2: y(tick) }));
    svg.append(label(box.left - 7, y(tick) + 4, format(tick), "end"));
  }
  for (const tick of xTicks) {
    svg.append(shape("line", { class: "grid", x1: x(tick), x2: x(tick), y1: box.top, y2: box.bottom }));
    svg.append(label(x(tick), box.bottom + 16, short(tick)));
  }
  svg.append(shape("path", { class: "axis", fill: "none", d: `M${box.left},${box.top}V${box.bottom}H${box.right}` }));
}

function axisOf(key, index, start, end) {
  const values = data.trials.map((t) => t.params[index]).filter((v) => v !== null);
  if (key.kind === "choice") {
    const names = [...new Set(data.trials.map((t) => String(t.params[index])))].sort();
    const inset = (end - start) * 0.1; // its lines meet in few places: their names need room
    const place = scale(0, names.length - 1, start + inset, end - inset);
    return { place: (v) => place(names.indexOf(String(v))), ticks: names };
  }
  const [low, high] = key.range ?? padded(values, key.log, 0);
  return { place: scale(low, high, start, end, key.log), ticks: ticks(low, high, 5, key.log) };
}

function drawParallel() {
  const narrow = width_of("parallel") < 640;
  const [svg, width] = canvas(at("parallel"), narrow ? 320 : 360, "Parallel coordinates of all trials");
  const height = Number(svg.getAttribute("height")), top = narrow ? 50 : 32, bottom = height - 16;
  const names = [...data.keys.map((k) => k.name), data.metric];
  const left = narrow ? 44 : 74, right = width - (narrow ? 22 : 60);
  const x = scale(0, names.length - 1, left, right);
  const axes = data.keys.map((key, i) => axisOf(key, i, bottom, top));
  if (valued.length) {
    const [low, high] = padded(valued.map((t) => t.best), false, 0.02);
    const [from, to] = data.mode === "max" ? [bottom, top] : [top, bottom]; // the best on top
    axes.push({ place: scale(low, high, from, to), ticks: ticks(low, high, 5) });
  }
  const colours = ramp();
  for (const trial of ranked(data.trials).sort((a, b) => (a.number === data.best) - (b.number === data.best))) {
    const points = data.keys.map((_, i) => [x(i), axes[i].place(trial.params[i])]).filter((p) => Number.isFinite(p[1]));
    if (trial.best !== null) points.push([x(names.length - 1), axes[names.length - 1].place(trial.best)]);
    const path = points.map(([px, py], i) => {
      if (!i) return `M${px},${py}`;
      const [ox, oy] = points[i - 1], middle = (ox + px) / 2;
      return `C${middle},${oy} ${middle},${py} ${px},${py}`;
    }).join("");
    const stroke = trial.number === data.best ? variable("--best") : tint(trial, colours);
    svg.append(shape("path", { "data-trial": trial.number, d: path, stroke, class: "line" + (trial.number === data.best ? " best-line" : "") }));
    svg.append(shape("path", { "data-trial": trial.number, d: path, class: "reach" }));
  }
  axes.forEach((axis, i) => {
    svg.append(shape("line", { class: "axis", x1: x(i), x2: x(i), y1: top, y2: bottom }));
    const anchor = i === 0 && narrow ? "start" : i === axes.length - 1 && narrow ? "end" : "middle";
    const tx = anchor === "start" ? 0 : anchor === "end" ? width : x(i);
    svg.append(label(tx, narrow && i % 2 ? 14 : top - 14, names[i], anchor, "title"));
    for (const tick of axis.ticks) {
      const y = axis.place(tick), text = short(tick);
      svg.append(shape("line", { class: "axis", x1: x(i) - 3, x2: x(i) + 3, y1: y, y2: y }));
      const backed = label(x(i) - 6, y + 4, narrow && text.length > 7 ? text.slice(0, 6) + "…" : text, "end");
      backed.setAttribute("paint-order", "stroke");
      backed.setAttribute("stroke", variable("--card"));
      backed.setAttribute("stroke-width", 3.5);
      backed.setAttribute("pointer-events", "none");
      svg.append(backed);
    }
  });
}

function drawMap() {
  const [svg, width] = canvas(at("map"), 400, `${data.metric} over two parameters`);
  const height = 400, box = { left: 52, right: width - 14, top: 8, bottom: height - 84 };
  if (!data.map || !valued.length) return svg.append(label(width / 2, height / 2, "needs two swept numbers, and a trial with a value"));
  const [i, j] = data.map, [kx, ky] = [data.keys[i], data.keys[j]];
  at("map-title").textContent = `Map of ${data.metric} over ${kx.name} and ${ky.name}`;
  const ax = axisOf(kx, i, box.left + 10, box.right - 10), ay = axisOf(ky, j, box.bottom - 10, box.top + 10);
  const colours = ramp();
  const dots = valued.map((t) => [ax.place(t.params[i]), ay.place(t.params[j]), ranks.get(t.number), t]);
  ground(svg, box, dots, colours);
  frame(svg, box, ax.place, ay.place, ax.ticks, ay.ticks);
  svg.append(label((box.left + box.right) / 2, box.bottom + 32, kx.name, "middle", "title"));
  const up = label(0, 0, ky.name, "middle", "title");
  up.setAttribute("transform", `translate(12 ${(box.top + box.bottom) / 2}) rotate(-90)`);
  svg.append(up);
  for (const [cx, cy, share, trial] of dots.sort((a, b) => a[2] - b[2])) {
    const r = 4 + 5 * Math.sqrt(trial.epoch / Math.max(1, data.num_epochs));
    const kind = "dot" + (trial.number === data.best ? " best-dot" : "");
    svg.append(shape("circle", { "data-trial": trial.number, class: kind, cx, cy, r, fill: colours(share) }));
  }
  legend(svg, box.left + 10, height - 34, box.right - box.left - 20, colours);
}

function ground(svg, box, dots, colours) {
  const [columns, rows] = [60, 40], [w, h] = [box.right - box.left, box.bottom - box.top], reach = 0.13;
  const group = shape("g", { "shape-rendering": "crispEdges" });
  for (let c = 0; c < columns; c++)
    for (let r = 0; r < rows; r++) {
      const [x, y] = [box.left + ((c + 0.5) / columns) * w, box.top + ((r + 0.5) / rows) * h];
      let [sum, weights] = [0, 0];
      for (const [dx, dy, share] of dots) {
        const weight = Math.exp(-(((x - dx) / w) ** 2 + ((y - dy) / h) ** 2) / (2 * reach * reach));
        sum += weight * share;
        weights += weight;
      }
      const strength = 0.5 * Math.min(1, weights * 1.4);
      if (strength < 0.02) continue;
      group.append(shape("rect", { x: box.left + (c / columns) * w, y: box.top + (r / rows) * h, width: w / columns + 0.6, height: h / rows + 0.5, fill: colours(sum / weights, strength) }));
    }
  svg.append(group);
}

function legend(svg, x, y, width, colours) {
  for (let i = 0; i < 60; i++) svg.append(shape("rect", { x: x + (i / 60) * width, y, width: width / 60 + 0.5, height: 8, fill: colours(i / 59), "shape-rendering": "crispEdges" }));
  const values = valued.map((t) => t.best).sort((a, b) => sign * (a - b));
  for (const share of [0, 0.5, 1]) {
    const value = values[Math.round(share * (values.length - 1))];
    svg.append(label(x + share * width, y + 22, `${["worst", "median", "best"][share * 2]} ${short(value)}`, ["start", "middle", "end"][share * 2]));
  }
}

function drawClip() {
  const clip = data.clip;
  at("advice").textContent = clip.lines.join("\n");
  const own = clip.trials.filter((t) => t.clip !== null);
  if (!clip.line.length) return at("clip").replaceChildren();
  const [svg, width] = canvas(at("clip"), 230, "Share of steps that a clip touches");
  const box = { left: 46, right: width - 14, top: 10, bottom: 190 };
  const [low, high] = padded([...clip.line.map((p) => p[0]), ...own.map((t) => t.clip), clip.low, clip.high].filter((v) => v > 0), true, 0.02);
  const x = scale(low, high, box.left, box.right, true), y = scale(0, 1, box.bottom, box.top);
  const band = { x: x(clip.low), y: box.top, width: Math.max(2, x(clip.high) - x(clip.low)), height: box.bottom - box.top };
  svg.append(shape("rect", { ...band, fill: "var(--band)", id: "clip-band" }));
  svg.append(label(band.x + band.width / 2, box.top + 14, `${short(clip.low)} – ${short(clip.high)}`, "middle", "title"));
  frame(svg, box, x, y, ticks(low, high, width < 420 ? 4 : 7, true), [0, 0.25, 0.5, 0.75, 1], (v) => `${Math.round(v * 100)} %`);
  svg.append(label((box.left + box.right) / 2, 226, "GRAD_NORM_CLIP"));
  svg.append(shape("path", { fill: "none", stroke: variable("--done"), "stroke-width": 2.2, d: clip.line.map((p, i) => `${i ? "L" : "M"}${x(p[0])},${y(p[1])}`).join("") }));
  const colours = ramp();
  for (const { number, clip: value, touched } of own) {
    const kind = "dot" + (number === data.best ? " best-dot" : "");
    svg.append(shape("circle", { "data-trial": number, class: kind, cx: x(value), cy: y(touched), r: 5, fill: tint(byNumber.get(number), colours) }));
  }
}

function drawImportance() {
  at("importance-note").textContent = data.importance_note;
  at("importance").replaceChildren(...data.importance.map((factor) => {
    const fill = node("div", { class: "fill" });
    fill.style.width = `${100 * factor.share}%`;
    return node("div", { class: "factor" }, node("div", { class: "name", title: factor.key }, factor.name), node("div", { class: "track" }, fill),
      node("div", { class: "share" }, `${Math.round(100 * factor.share)} %`), node("div", { class: "says" }, factor.says));
  }));
}

function drawCost() {
  at("cost-note").textContent = data.cost.says;
  const [svg, width] = canvas(at("cost"), 220, "Epochs that each trial trained");
  const box = { left: 36, right: width - 6, top: 8, bottom: 178 };
  const trials = [...data.trials].sort((a, b) => a.number - b.number), most = Math.max(1, data.num_epochs, ...trials.map((t) => t.trained));
  if (!trials.length) return;
  const x = scale(0, trials.length, box.left, box.right), y = scale(0, most, box.bottom, box.top);
  frame(svg, box, x, y, [], ticks(0, most, 4));
  const room = (box.right - box.left) / trials.length, wide = Math.max(1, Math.min(26, room * 0.74));
  const every = Math.ceil(22 / room);
  trials.forEach((trial, i) => {
    const left = x(i + 0.5) - wide / 2, fill = trial.number === data.best ? variable("--best") : variable(`--${{ running: "run", waiting: "stopped" }[trial.state] ?? trial.state}`);
    svg.append(shape("rect", { x: left, y: y(data.num_epochs), width: wide, height: box.bottom - y(data.num_epochs), fill: variable("--rule"), opacity: 0.55, "data-trial": trial.number }));
    svg.append(shape("rect", { x: left, y: y(trial.trained), width: wide, height: box.bottom - y(trial.trained), fill, class: "bar", "data-trial": trial.number }));
    if (i % every === 0) svg.append(label(x(i + 0.5), box.bottom + 15, String(trial.number)));
  });
  svg.append(label((box.left + box.right) / 2, box.bottom + 34, "epochs trained, by trial; grey: what stopping saved"));
}

// ---- text

function drawHead() {
  at("title").textContent = data.name;
  at("subtitle").textContent = data.subtitle;
  at("footer").textContent = data.footer;
  at("tiles").replaceChildren(...data.tiles.map(([big, small], i) => node("div", { class: i ? "tile" : "tile first" }, node("b", {}, big), node("span", {}, small))));
  at("best-card").hidden = data.best === null;
  at("best-note").textContent = data.best_note;
  at("best").textContent = data.best_config;
}

let order = { column: null, up: true };

function drawTable() {
  const own = data.keys.map((key, i) => [key.name, (t) => t.params[i], key.kind === "choice" ? "text" : ""]);
  const columns = [["trial", (t) => t.number, "text"], ["state", (t) => t.state, "text"], ...own, ["epoch", (t) => t.epoch, ""],
    [data.metric, (t) => t.value, ""], ["best", (t) => t.best, ""], ["seconds", (t) => t.seconds, ""], ["why, or error", (t) => t.error_line ?? t.why, "text"]];
  const rows = order.column === null ? ranked(data.trials).reverse() : [...data.trials].sort((a, b) => compared(columns[order.column][1](a), columns[order.column][1](b)));
  const head = columns.map(([name, , kind], i) => {
    const button = node("button", { type: "button" }, name);
    button.addEventListener("click", () => {
      order = { column: i, up: order.column === i ? !order.up : true };
      drawTable();
    });
    const sorted = order.column === i ? (order.up ? "ascending" : "descending") : null;
    return node("th", { class: kind, scope: "col", "aria-sort": sorted }, button);
  });
  const colours = ramp();
  at("trials").replaceChildren(node("thead", {}, node("tr", {}, ...head)), node("tbody", {}, ...rows.map((trial) => row(trial, columns, colours))));
}

function row(trial, columns, colours) {
  const cells = columns.map(([name, of, kind], i) => {
    const value = of(trial), text = name === "seconds" ? value.toFixed(1) : name === "epoch" ? `${value}/${data.num_epochs}` : name === "best" || name === data.metric ? precise(value) : short(value);
    const cell = node(i ? "td" : "th", { class: name === "why, or error" && trial.error ? "text error" : i ? kind : "text", scope: i ? null : "row" });
    if (!i) {
      const chip = node("span", { class: "chip" });
      chip.style.background = trial.number === data.best ? variable("--best") : tint(trial, colours);
      cell.append(chip);
    }
    if (name === "why, or error" && value) cell.title = trial.error ?? value;
    cell.append(name === "why, or error" && !value ? "" : text);
    return cell;
  });
  return node("tr", { "data-trial": trial.number, class: trial.number === data.best ? "best-row" : null }, ...cells);
}

function compared(a, b) {
  if (a === null || b === null) return (a === null) - (b === null); // what is unknown stays last
  const sense = order.up ? 1 : -1;
  return sense * (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)));
}

// ---- one trial is looked at: in every chart, and what it is in a tip

let hot = null;

function look(number) {
  if (number === hot) return;
  for (const element of document.querySelectorAll(".hot")) element.classList.remove("hot");
  hot = number;
  document.body.classList.toggle("dimmed", number !== null);
  at("tip").hidden = number === null;
  if (number === null) return;
  for (const element of document.querySelectorAll(`[data-trial="${number}"]`)) if (!element.classList.contains("reach")) element.classList.add("hot");
  const trial = byNumber.get(number), line = (name, value) => node("div", {}, node("span", {}, name), node("span", {}, value));
  at("tip").replaceChildren(
    node("b", {}, `trial ${number}${number === data.best ? ", the best" : ""}`),
    ...data.keys.map((key, i) => line(key.name, short(trial.params[i]))),
    line(`best ${data.metric}`, trial.best === null ? "none" : `${precise(trial.best)} (epoch ${trial.best_epoch})`),
    line(trial.state, `epoch ${trial.epoch}/${data.num_epochs}`),
    line("time", span(trial.seconds)),
    ...trial.clones.map(([epoch, from]) => line("cloned", `trial ${from}, epoch ${epoch}`)),
    ...(trial.error ? [line("error", trial.error_line.slice(0, 160))] : []),
  );
}

function follow(event) {
  const found = event.target.closest?.("[data-trial]");
  look(found ? Number(found.dataset.trial) : null);
  if (!found) return;
  const tip = at("tip"), [width, height] = [tip.offsetWidth, tip.offsetHeight];
  const left = event.clientX + 16 + width > innerWidth ? event.clientX - width - 12 : event.clientX + 16;
  tip.style.left = `${Math.max(6, left)}px`;
  tip.style.top = `${Math.max(6, Math.min(innerHeight - height - 6, event.clientY + 14))}px`;
}

function drawTools() {
  const choice = (text, value) => {
    const button = node("button", { type: "button", "aria-pressed": String(zoomed === value) }, text);
    button.addEventListener("click", () => {
      zoomed = value;
      drawTools();
      drawCurves();
    });
    return button;
  };
  at("curve-tools").replaceChildren(choice("all values", false), choice("the best closely", true));
}

function drawCharts() {
  look(null);
  for (const draw of [drawCurves, drawParallel, drawMap, drawClip, drawCost, drawTable]) draw();
}

drawHead();
drawImportance();
drawTools();
drawCharts();
document.addEventListener("pointermove", follow);
document.addEventListener("pointerdown", follow);
document.addEventListener("scroll", () => look(null), { passive: true });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawCharts);
let drawnWidth = innerWidth;
addEventListener("resize", () => {
  if (innerWidth !== drawnWidth) drawCharts();
  drawnWidth = innerWidth;
});
document.documentElement.dataset.drawn = "true";
