"use strict";
// The page of `millstream watch`: asks for /state.json every second, and for /curves.json when there is more of them.
// All that comes from runs is put in as text (textContent), never as markup.

const CHARTS = [
  { keys: ["loss", "eval_loss"], title: "loss", format: plain, exact: fixed, canBeLog: true },
  { keys: ["lr"], title: "learning rate", format: short, zero: true },
  { keys: ["grad_norm"], title: "gradient norm, before clipping", format: short },
  { keys: ["tokens_per_second"], title: "tokens a second", format: short, zero: true },
  { keys: ["mfu"], title: "model FLOPs utilisation", format: percent, zero: true },
  { keys: ["memory_bytes"], title: "memory of the largest rank, on its host", format: bytes, zero: true },
  { keys: ["gpu_bytes"], title: "GPU memory of rank 0, at most", format: bytes, zero: true },
];
const PHASES = ["start", "data", "forward", "backward", "reduce", "step", "evaluate", "save", "end"];
const GOOD = ["running", "finished"], BAD = ["failed", "ended", "silent"];
const NUM_COLOURS = 8, HEIGHT = 210, LEFT = 52, RIGHT = 12, TOP = 10, BOTTOM = 24;

let states = { runs: [], time: 0 }, curves = { runs: [] }, seen = "", told = "", heard = 0;
const hidden = new Set();
const byId = (id) => document.getElementById(id);

// --- numbers for people ------------------------------------------------------------------------------------------
function fixed(value) { return Math.abs(value) >= 100 ? short(value) : value.toFixed(3); }
function plain(value) {
  const size = Math.abs(value);
  return size >= 1e4 || (size && size < 1e-3) ? short(value) : String(Number(value.toFixed(3)));
}
function percent(value) { return (100 * value).toFixed(1) + " %"; }
function whole(value) { return value == null ? "" : Math.round(value).toLocaleString("en-US"); }
function bytes(value) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let place = 0;
  while (value >= 1000 && place < units.length - 1) { value /= 1000; place += 1; }
  return `${Number(value.toPrecision(3))} ${units[place]}`;
}
function short(value) {
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 1e9) return Number((value / 1e9).toPrecision(3)) + " G";
  if (size >= 1e6) return Number((value / 1e6).toPrecision(3)) + " M";
  if (size >= 1e4) return Number((value / 1e3).toPrecision(3)) + " k";
  if (size < 1e-2) return value.toExponential(1).replace("e-", "e−");
  return String(Number(value.toPrecision(3)));
}
function number(value, format) { return value == null ? "–" : typeof value === "string" ? value : format(value); }
function duration(seconds) {
  if (seconds < 120) return `${seconds < 10 ? seconds.toFixed(1) : Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60), hours = Math.floor(minutes / 60);
  if (minutes < 60) return `${minutes} min`;
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.floor(hours / 24)} d ${hours % 24} h`;
}
function clock(seconds) { return new Date(seconds * 1000).toLocaleString("sv-SE"); }

// --- elements ----------------------------------------------------------------------------------------------------
function element(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}
function svg(name, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}
function fill(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children.filter((child) => child != null && child !== ""));
  return made;
}
function colour(index) { return `c${index % NUM_COLOURS}`; }
function swatch(index) { return element("span", { class: `swatch ${colour(index)}` }); }
function lineKey(index, isDashed) {
  const line = svg("path", { class: `line ${colour(index)}${isDashed ? " dashed" : ""}`, d: "M0 5H14" });
  return svg("svg", { viewBox: "0 0 14 10" }, line);
}

// --- runs --------------------------------------------------------------------------------------------------------
function drawRuns() {
  byId("runs").replaceChildren(...states.runs.map(runCard));
}
function runCard(run, index) {
  const box = element("input", { type: "checkbox", "aria-label": `show ${run.name}` });
  box.checked = !hidden.has(index);
  box.addEventListener("change", () => {
    if (box.checked) hidden.delete(index); else hidden.add(index);
    told = "";
    draw();
  });
  const kind = GOOD.includes(run.state) ? "good" : BAD.includes(run.state) ? "bad" : "wait";
  const top = element("div", { class: "top" }, states.runs.length > 1 ? box : null, element("b", {}, run.name),
    element("span", { class: `pill ${kind}` }, run.state));
  const share = run.num_steps ? Math.min(1, run.step / run.num_steps) : 0;
  let progress = `step ${whole(run.step)}` + (run.num_steps ? ` of ${whole(run.num_steps)}` : "");
  if (run.seconds_left) progress += ` · about ${duration(run.seconds_left)} left`;
  if (run.read < 1) progress += ` · reading the curves: ${Math.floor(100 * run.read)} %`;
  const bar = svg("svg", { viewBox: "0 0 1000 6", preserveAspectRatio: "none" },
    svg("rect", { class: "fill", width: 1000 * share, height: 6 }));
  const tiles = [
    ["loss", number(run.loss, fixed)], ["held out", number(run.eval_loss, fixed)],
    ["tokens/s", number(run.tokens_per_second, whole)],
    ["checkpoint", run.checkpoint == null ? "none yet" : whole(run.checkpoint)],
  ];
  if (run.mfu != null) tiles.push(["MFU", number(run.mfu, percent)]);
  if (run.state === "running" && run.last_mark) {
    tiles.push(["last mark", `${duration(Math.max(0, states.time - run.last_mark))} ago`]);
  }
  const why = run.why ? element("p", { class: `why${kind === "bad" ? " bad" : ""}` }, run.why) : null;
  return element("article", { class: `card run ${colour(index)}${hidden.has(index) ? " hidden" : ""}` }, top, why,
    run.num_steps ? element("div", { class: "bar" }, bar) : null, element("div", { class: "progress" }, progress),
    element("div", { class: "tiles" },
      ...tiles.map(([name, value]) => element("div", {}, element("b", {}, value), element("span", {}, name)))));
}

// --- charts ------------------------------------------------------------------------------------------------------
function shownSeries(chart) {
  const found = [];
  curves.runs.forEach((run, index) => {
    for (const key of chart.keys) {
      if (run.points[key] && !hidden.has(index)) {
        found.push({ run: index, key, points: run.points[key], width: run.width, isHeldOut: key === "eval_loss" });
      }
    }
  });
  return found;
}
function ticks(low, high, wanted) {
  const rough = (high - low) / wanted, power = 10 ** Math.floor(Math.log10(rough));
  const size = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((each) => each >= rough);
  const found = [];
  for (let value = Math.ceil(low / size) * size; value <= high + size * 1e-6; value += size) {
    found.push(Math.abs(value) < size * 1e-6 ? 0 : value);
  }
  return found;
}
function logTicks(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power += 1) {
    for (const factor of [1, 1.5, 2, 3, 5, 7]) {
      const value = factor * 10 ** power;
      if (value >= low && value <= high) found.push(value);
    }
  }
  return found.length ? found : [low, high];
}
function range(series, chart, isLog) {
  let low = Infinity, high = -Infinity;
  for (const { points } of series) {
    for (const [, mean] of points) {
      if (isLog && mean <= 0) continue;
      low = Math.min(low, mean); high = Math.max(high, mean);
    }
  }
  if (low > high) return null;
  if (isLog) return [low * 0.97, high * 1.03];
  if (chart.zero) low = Math.min(0, low);
  const room = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
  return [low >= 0 && low < room ? 0 : low - room, high + room];
}
function drawCharts() {
  const place = byId("charts");
  for (const chart of CHARTS) {
    const series = shownSeries(chart);
    chart.card ??= element("article", { class: "card chart" });
    if (!series.length) { chart.card.remove(); continue; }
    const after = CHARTS.slice(CHARTS.indexOf(chart) + 1).find((other) => other.card?.isConnected);
    if (!chart.card.isConnected) place.insertBefore(chart.card, after?.card ?? null);
    drawChart(chart, series);
  }
}
function drawChart(chart, series) {
  const isLog = chart.canBeLog && byId("log-scale").checked;
  const between = range(series, chart, isLog);
  if (!between) return;
  const width = Math.max(240, chart.card.clientWidth - 28), [low, high] = between;
  const first = Math.min(...series.map(({ points }) => points[0][0]));
  const last = Math.max(first + 1, ...series.map(({ points }) => points[points.length - 1][0]));
  const x = (step) => LEFT + (width - LEFT - RIGHT) * (step - first) / (last - first);
  const scale = isLog ? (value) => Math.log(Math.max(value, low) / low) / Math.log(high / low)
    : (value) => (value - low) / (high - low);
  const y = (value) => HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * Math.min(1.02, Math.max(-0.02, scale(value)));
  const picture = svg("svg",
    { viewBox: `0 0 ${width} ${HEIGHT}`, height: HEIGHT, role: "img", "aria-label": chart.title });
  for (const value of isLog ? logTicks(low, high) : ticks(low, high, 4)) {
    const at = y(value).toFixed(1);
    picture.append(svg("path", { class: "grid", d: `M${LEFT} ${at}H${width - RIGHT}` }),
      svg("text", { x: LEFT - 7, y: Number(at) + 4, "text-anchor": "end" }, chart.format(value)));
  }
  for (const step of ticks(first, last, Math.min(6, Math.floor(width / 80))).filter(Number.isInteger)) {
    const shown = step >= 1e5 ? short(step) : whole(step);
    picture.append(svg("text", { x: x(step), y: HEIGHT - 7, "text-anchor": "middle" }, shown));
  }
  picture.append(svg("path", { class: "axis", d: `M${LEFT} ${HEIGHT - BOTTOM}H${width - RIGHT}` }));
  for (const each of series) drawSeries(picture, each, x, y);
  const cursor = svg("path", { class: "cursor", d: "", "pointer-events": "none" });
  picture.append(cursor);
  picture.addEventListener("mousemove", (event) => {
    const box = picture.getBoundingClientRect();
    const step = first + (last - first) * (event.clientX - box.left - LEFT) / (width - LEFT - RIGHT);
    cursor.setAttribute("d", `M${x(Math.min(last, Math.max(first, step)))} ${TOP}V${HEIGHT - BOTTOM}`);
    showTip(event, chart, series, step);
  });
  picture.addEventListener("mouseleave", () => { cursor.setAttribute("d", ""); byId("tip").hidden = true; });
  const head = element("div", { class: "head" }, element("h2", {}, chart.title), legend(series));
  chart.card.replaceChildren(head, picture);
}
function drawSeries(picture, { run, points, isHeldOut }, x, y) {
  const at = (step, value) => `${x(step).toFixed(1)} ${y(value).toFixed(1)}`;
  if (points.some((point) => point.length > 2)) {
    const upper = points.map(([step, mean, , high]) => at(step, high ?? mean));
    const lower = points.map(([step, mean, low]) => at(step, low ?? mean)).reverse();
    picture.append(svg("path", { class: `band ${colour(run)}`, d: `M${upper.join("L")}L${lower.join("L")}Z` }));
  }
  const line = points.map(([step, mean]) => at(step, mean)).join("L");
  picture.append(svg("path", { class: `line ${colour(run)}${isHeldOut ? " dashed" : ""}`, d: `M${line}` }));
  if (points.length === 1 || (isHeldOut && points.length <= 20)) {
    for (const [step, mean] of points) {
      picture.append(svg("circle", { class: `dot ${colour(run)}`, cx: x(step), cy: y(mean), r: 3 }));
    }
  }
}
function nameOf({ run, isHeldOut }) {
  const name = states.runs.length > 1 ? states.runs[run]?.name ?? "" : isHeldOut ? "" : "training";
  return [name, isHeldOut ? "held out" : ""].filter(Boolean).join(", ");
}
function legend(series) {
  if (series.length < 2) return null;
  const own = series.filter((each) => !each.isHeldOut || states.runs.length === 1);
  return element("div", { class: "legend" },
    ...own.map((each) => element("span", { class: "key" }, lineKey(each.run, each.isHeldOut), nameOf(each))),
    own.length < series.length ? "dashed: held out" : null);
}
function nearest(points, step) {
  let low = 0, high = points.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (points[middle][0] < step) low = middle + 1; else high = middle;
  }
  return low > 0 && step - points[low - 1][0] < points[low][0] - step ? points[low - 1] : points[low];
}
function showTip(event, chart, series, step) {
  const rows = series.map((each) => {
    const [from, mean, low, high] = nearest(each.points, step);
    const steps = each.width > 1 && low != null ? `${whole(from)}–${whole(from + each.width - 1)}` : whole(from);
    const exact = chart.exact ?? chart.format;
    const spread = low == null ? "" : ` (${exact(low)} to ${exact(high)})`;
    return element("div", {}, swatch(each.run), `${nameOf(each) || chart.title}, step ${steps}: `,
      element("b", {}, exact(mean)), spread);
  });
  const tip = byId("tip");
  tip.replaceChildren(...rows);
  tip.hidden = false;
  const room = window.innerWidth - event.clientX;
  tip.style.left = `${room < tip.offsetWidth + 30 ? event.clientX - tip.offsetWidth - 14 : event.clientX + 14}px`;
  tip.style.top = `${event.clientY + 16}px`;
}

// --- what each rank does -----------------------------------------------------------------------------------------
function drawRanks() {
  const cards = [];
  states.runs.forEach((run, index) => {
    if (run.ranks.length && !hidden.has(index)) cards.push(lanes(run, index));
  });
  byId("ranks").replaceChildren(...cards);
}
function lanes(run, index) {
  const width = Math.max(260, byId("ranks").clientWidth - 30), lane = 18, left = 66, right = 132;
  const marks = run.ranks.flatMap(({ marks: each }) => each.map(([ago]) => ago));
  const span = Math.min(width < 600 ? 4 : 12, Math.max(0.05, ...marks)), height = run.ranks.length * lane + 20;
  const x = (ago) => left + (width - left - right) * (1 - Math.min(ago, span) / span);
  const picture = svg("svg",
    { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": "phases of the ranks" });
  run.ranks.forEach((rank, row) => {
    const y = row * lane;
    picture.append(svg("text", { x: 0, y: y + 12 }, `rank ${rank.rank}`));
    rank.marks.forEach(([ago, , phase], number) => {
      const until = number + 1 < rank.marks.length ? rank.marks[number + 1][0] : 0;
      const rect = svg("rect", { class: phase, x: x(ago).toFixed(1), y: y + 2, height: lane - 5,
        width: Math.max(0.5, x(until) - x(ago)).toFixed(1) });
      rect.append(svg("title", {}, `${phase} of step ${rank.marks[number][1]}: ${duration(Math.max(0, ago - until))}`));
      picture.append(rect);
    });
    const says = rank.phase ? `${rank.phase}, ${whole(rank.step)}` : "no mark yet";
    const process = rank.process === "running" || rank.process === "elsewhere" ? "" : ` (${rank.process})`;
    picture.append(svg("text", { x: width - right + 8, y: y + 12 }, says + process));
  });
  picture.append(svg("text", { x: left, y: height - 4 }, `${duration(span)} ago`),
    svg("text", { x: width - right, y: height - 4, "text-anchor": "end" }, "newest mark"));
  const used = PHASES.filter((phase) => run.ranks.some((rank) => rank.marks.some((mark) => mark[2] === phase)));
  const keys = used.map((phase) => element("span", { class: "key" },
    svg("svg", { viewBox: "0 0 14 10" }, svg("rect", { class: phase, width: 14, height: 10, rx: 2 })), phase));
  const more = run.num_ranks > run.ranks.length ? ` (the first ${run.ranks.length} of ${whole(run.num_ranks)})` : "";
  const slow = run.straggler, isOneOfMany = states.runs.length > 1;
  const said = slow && run.num_ranks > 1 ? element("p", { class: "why" },
    `behind in the last minute: rank ${slow.rank} in ${slow.phase}, by ${number(slow.seconds, short)} s a step ` +
    `of ${number(slow.step_seconds, short)} s`) : null;
  return element("article", { class: "card lanes" },
    element("h2", {}, isOneOfMany ? swatch(index) : null, "what the ranks do", isOneOfMany ? `: ${run.name}` : "",
      more),
    picture, element("div", { class: "phases" }, ...keys), said);
}

// --- incidents and samples ---------------------------------------------------------------------------------------
function drawIncidents() {
  const found = states.runs.flatMap((run, index) =>
    hidden.has(index) ? [] : run.incidents.map((each) => ({ ...each, index })));
  if (!found.length) { byId("incidents").replaceChildren(); return; }
  found.sort((one, other) => other.time - one.time);
  const head = element("tr", {}, ...["when", "what", "step", "rank", ""].map((name) => element("th", {}, name)));
  const rows = found.slice(0, 100).map((each) => element("tr", {},
    element("td", {}, states.runs.length > 1 ? swatch(each.index) : null, each.time ? clock(each.time) : ""),
    element("td", {}, each.kind), element("td", {}, number(each.step, whole).replace("–", "")),
    element("td", {}, each.rank == null ? "" : String(each.rank)), element("td", {}, each.text)));
  const total = states.runs.reduce((sum, run) => sum + run.num_incidents, 0);
  byId("incidents").replaceChildren(element("article", { class: "card" },
    element("h2", {}, `incidents (${whole(total)})`),
    element("div", { class: "table" }, element("table", {}, head, ...rows))));
}
function drawSamples() {
  const title = (run, index) => states.runs.length > 1 ? [swatch(index), `samples of ${run.name}`] : ["samples"];
  const cards = states.runs.flatMap((run, index) => run.samples.length && !hidden.has(index) ? [element("article",
    { class: "card" }, element("h2", {}, ...title(run, index)),
    ...run.samples.map((sample) => element("pre", {}, sample)))] : []);
  byId("samples").replaceChildren(...cards);
}

// --- keeping up --------------------------------------------------------------------------------------------------
function draw() {
  drawRuns(); drawCharts(); drawRanks();
  const texts = JSON.stringify(states.runs.map((run) => [run.incidents, run.samples]));
  if (texts !== told) { drawIncidents(); drawSamples(); told = texts; }  // else what a reader has marked would be lost
  const running = states.runs.filter((run) => run.state === "running").length;
  document.title = states.runs.length === 1
    ? `${states.runs[0].state} ${whole(states.runs[0].step)} · ${states.runs[0].name}`
    : `${running} of ${states.runs.length} running`;
}
async function ask(path) {
  const answer = await fetch(path, { signal: AbortSignal.timeout(15000) });
  if (!answer.ok) throw new Error(`${path}: ${answer.status}`);
  return answer.json();
}
async function keepUp() {
  try {
    states = await ask("state.json");
    const versions = states.runs.map((run) => run.version).join();
    if (versions !== seen) { curves = await ask("curves.json"); seen = versions; }
    heard = Date.now();
    draw();
  } catch {
    // said below, and tried again
  }
  const seconds = (Date.now() - heard) / 1000, live = byId("live");
  live.className = heard && seconds < 5 ? "" : "lost";
  live.textContent = seconds < 5 ? `live · ${new Date().toLocaleTimeString("sv-SE")}` : heard
    ? `no answer for ${duration(seconds)}: does millstream watch still run?` : "no answer";
  setTimeout(keepUp, document.hidden ? 5000 : 1000);
}
byId("log-scale").addEventListener("change", drawCharts);
new ResizeObserver(() => { if (heard) { drawCharts(); drawRanks(); } }).observe(byId("charts"));
keepUp();
