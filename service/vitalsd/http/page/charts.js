// Draw the plots on canvas: with an element for each point there would be thousands.

const COLOURS = 8;

let theme = null;
function colours() {
  if (!theme) {
    const style = getComputedStyle(document.documentElement);
    const read = (name) => style.getPropertyValue(name).trim();
    theme = { ink: read("--ink"), dim: read("--dim"), rule: read("--rule"), accent: read("--accent"), warn: read("--warn"),
      bad: read("--bad"), other: read("--other"), card: read("--card"),
      series: Array.from({ length: COLOURS }, (_, i) => read(`--c${i}`)) };
  }
  return theme;
}

// Give each of the busiest threads a colour, which it keeps as long as it is one of them.
function palette() {
  const busiest = [...threads.values()].filter((thread) => thread.peak >= IDLE).sort((a, b) => b.mean - a.mean).slice(0, COLOURS);
  const taken = new Set();
  for (const thread of threads.values())
    if (!busiest.includes(thread)) thread.colour = -1;
  for (const thread of busiest) if (thread.colour >= 0) taken.add(thread.colour);
  for (const thread of busiest)
    if (thread.colour < 0) {
      let free = 0;
      while (taken.has(free)) free++;
      thread.colour = free;
      taken.add(free);
    }
  return busiest.sort((a, b) => a.colour - b.colour);
}

const LEFT = 46, BOTTOM = 18, TOP = 6;

function surface(canvas) {
  const ratio = devicePixelRatio || 1;
  const width = canvas.clientWidth, height = canvas.clientHeight;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
  }
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, height);
  return { pen, width, height };
}

function nice(value, steps) {
  const power = 10 ** Math.floor(Math.log10(value));
  return steps.find((step) => step * power >= value) * power;
}

const STEPS = [1000, 2000, 5000, 10000, 15000, 30000, 60000, 120000, 300000, 600000, 1800000, 3600000, 7200000, 21600000];

function axes(pen, width, height, r, low, high, label, clocks) {
  const c = colours();
  pen.font = "11px system-ui, sans-serif";
  pen.lineWidth = 1;
  pen.textBaseline = "middle";
  pen.textAlign = "right";
  const lines = height > 150 ? 4 : 2;
  for (let i = 0; i <= lines; i++) {
    const y = Math.round(TOP + (height - TOP - BOTTOM) * (1 - i / lines)) + 0.5;
    pen.strokeStyle = c.rule;
    pen.beginPath();
    pen.moveTo(LEFT, y);
    pen.lineTo(width, y);
    pen.stroke();
    pen.fillStyle = c.dim;
    pen.fillText(label(low + ((high - low) * i) / lines), LEFT - 6, y);
  }
  pen.textAlign = "center";
  pen.textBaseline = "alphabetic";
  const span = r.end - r.start;
  const room = Math.max(2, Math.floor((width - LEFT) / 90));
  const every = STEPS.find((step) => span / step <= room) || 86400000;
  const zone = new Date(r.end).getTimezoneOffset() * 60000;
  for (let t = Math.ceil((r.start - zone) / every) * every + zone; t <= r.end; t += every) {
    const x = LEFT + ((t - r.start) / span) * (width - LEFT);
    pen.strokeStyle = c.rule;
    pen.beginPath();
    pen.moveTo(Math.round(x) + 0.5, TOP);
    pen.lineTo(Math.round(x) + 0.5, height - BOTTOM);
    pen.stroke();
    if (clocks && x > LEFT + 24 && x < width - 26) pen.fillText(every < 60000 ? clock(t) : clock(t).slice(0, 5), x, height - 4);
  }
}

function flags(pen, width, height, r, labels) {
  const c = colours();
  const at = (time) => Math.round(LEFT + ((Math.min(r.end, Math.max(r.start, time)) - r.start) / (r.end - r.start)) * (width - LEFT)) + 0.5;
  const shown = view.notes.filter((note) => lasts(note) >= r.start && note.time <= r.end);
  for (const note of shown) {
    note.x = at(note.time);
    pen.strokeStyle = pen.fillStyle = flagColour(note);
    if (note.kind === "hang") {
      hangSpan(pen, note.x, at(lasts(note)), height, goesOn(note));
      continue;
    }
    pen.setLineDash(note.kind === "mark" ? [] : [2, 3]);
    pen.beginPath();
    pen.moveTo(note.x, TOP);
    pen.lineTo(note.x, height - BOTTOM);
    pen.stroke();
    pen.setLineDash([]);
    pen.beginPath();
    pen.moveTo(note.x - 4, height - BOTTOM + 6);
    pen.lineTo(note.x, height - BOTTOM);
    pen.lineTo(note.x + 4, height - BOTTOM + 6);
    pen.fill();
  }
  if (!labels) return;
  pen.font = "11px system-ui, sans-serif";
  pen.textBaseline = "top";
  pen.textAlign = "left";
  let taken = LEFT;
  shown.forEach((note, i) => {
    const text = note.kind === "mark" ? note.text : note.kind === "hang" ? `${note.heartbeat} ${seconds(note.end - note.time)}` : note.kind;
    const next = i + 1 < shown.length ? shown[i + 1].x : width;
    const before = note.x - taken > pen.measureText(text).width + 12 && next - note.x < pen.measureText(text).width + 12;
    const fitting = before ? text : fit(pen, text, next - note.x - 12);
    if (!fitting) return;
    const wide = pen.measureText(fitting).width;
    const from = before ? note.x - wide - 10 : note.x;
    taken = from + wide + 10;
    pen.fillStyle = c.card;
    pen.globalAlpha = 0.88;
    pen.fillRect(from + 1, TOP, wide + 8, 15);
    pen.globalAlpha = 1;
    pen.fillStyle = flagColour(note);
    pen.fillText(fitting, from + 5, TOP + 2);
  });
}

function flagColour(note) {
  const c = colours();
  return note.kind === "mark" ? c.accent : note.kind === "exited" || goesOn(note) ? c.bad : c.warn;
}

// Return as much of a text as fits; nothing instead of one or two letters.
function fit(pen, text, room) {
  if (text.length > 24) text = `${text.slice(0, 23)}\u2026`;
  if (pen.measureText(text).width <= room) return text;
  for (let length = Math.min(text.length, Math.floor(room / 4)); length > 2; length--)
    if (pen.measureText(`${text.slice(0, length)}\u2026`).width <= room) return `${text.slice(0, length)}\u2026`;
  return "";
}

// Downsample: return at most one point per pixel, as [x, first, after): it shows the mean of these samples.
function columns(r, width) {
  const count = r.last - r.first;
  const per = Math.max(1, Math.ceil(count / Math.max(60, (width - LEFT) / 1.5)));
  const gap = 2.6 * median(r);
  const runs = [[]];
  for (let i = r.first; i < r.last; i += per) {
    const after = Math.min(r.last, i + per);
    const time = samples.time[slotOf(after - 1)];
    if (i > r.first && samples.time[slotOf(i)] - samples.time[slotOf(i - 1)] > gap) runs.push([]);
    runs[runs.length - 1].push([LEFT + ((time - r.start) / (r.end - r.start)) * (width - LEFT), i, after]);
  }
  return runs;
}

function plotCpu(r, busiest) {
  const { pen, width, height } = surface($("cpu-plot"));
  const c = colours();
  const runs = columns(r, width);
  let top = 10;
  for (const run of runs) for (const [, from, after] of run) top = Math.max(top, mean(samples.cpu, from, after));
  const high = nice(top * 1.05, [1, 1.2, 1.6, 2, 4, 6, 8, 10]);
  axes(pen, width, height, r, 0, high, (value) => `${+value.toFixed(1)} %`, true);
  const floor = height - BOTTOM;
  const scale = (floor - TOP) / high;
  for (const run of runs) {
    let below = run.map(() => 0);
    const totals = run.map(([, from, after]) => mean(samples.cpu, from, after));
    const layers = busiest.map((thread) => [c.series[thread.colour], run.map(([, from, after]) => mean(thread.cpu, from, after))]);
    layers.push([c.other, totals.map((total, i) => Math.max(0, total - layers.reduce((sum, [, values]) => sum + values[i], 0)))]);
    for (const [colour, values] of layers) {
      const above = below.map((base, i) => base + values[i]);
      pen.fillStyle = colour;
      pen.globalAlpha = 0.85;
      pen.beginPath();
      run.forEach(([x], i) => pen.lineTo(x, floor - above[i] * scale));
      for (let i = run.length - 1; i >= 0; i--) pen.lineTo(run[i][0], floor - below[i] * scale);
      pen.fill();
      below = above;
    }
    pen.globalAlpha = 1;
    pen.strokeStyle = c.ink;
    pen.lineWidth = 1.2;
    pen.lineJoin = "round";
    pen.beginPath();
    run.forEach(([x], i) => pen.lineTo(x, floor - totals[i] * scale));
    pen.stroke();
  }
  flags(pen, width, height, r, true);
}

function plotRss(r) {
  const { pen, width, height } = surface($("rss-plot"));
  const c = colours();
  const runs = columns(r, width);
  let low = Infinity, high = 0;
  for (let i = r.first; i < r.last; i++) {
    const value = samples.rss[slotOf(i)];
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  // The axis does not begin at zero, so that a leak of 1 % is visible. Its label shows where it begins.
  const spare = Math.max((high - low) * 0.15, high * 0.02);
  low = Math.max(0, low - spare);
  high += spare;
  axes(pen, width, height, r, low, high, (value) => size(value).replace("iB", ""), true);
  const floor = height - BOTTOM;
  const y = (value) => floor - ((value - low) / (high - low)) * (floor - TOP);
  for (const run of runs) {
    pen.strokeStyle = pen.fillStyle = c.series[0];
    pen.beginPath();
    for (const [x, , after] of run) pen.lineTo(x, y(samples.rss[slotOf(after - 1)]));
    pen.lineWidth = 1.5;
    pen.lineJoin = "round";
    pen.stroke();
    pen.lineTo(run[run.length - 1][0], floor);
    pen.lineTo(run[0][0], floor);
    pen.globalAlpha = 0.12;
    pen.fill();
    pen.globalAlpha = 1;
  }
  flags(pen, width, height, r, false);
}

function legend(busiest) {
  const list = $("legend");
  const alike = (thread) => busiest.filter((other) => other.label === thread.label).length > 1;
  const wanted = busiest.map((thread) => [String(thread.colour), alike(thread) ? `${thread.label} ${thread.tid}` : thread.label]);
  wanted.push(["other", "other and ended threads"]);
  const key = JSON.stringify(wanted);
  if (list.shown === key) return;
  list.shown = key;
  list.replaceChildren(...wanted.map(([colour, text]) => {
    const item = document.createElement("li"), swatch = document.createElement("span"), name = document.createElement("bdi");
    swatch.className = "swatch";
    swatch.dataset.colour = colour;
    name.textContent = text;
    item.append(swatch, name);
    return item;
  }));
}
