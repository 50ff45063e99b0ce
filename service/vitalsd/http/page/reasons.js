// Show what explains the CPU time and the memory: one card for each figure, and the child processes. Only if it is open.

const ABSENT = "\u2013";
const measured = (value) => (Number.isNaN(value) ? ABSENT : value > 0 && value < IDLE ? "<0.1 %" : `${value.toFixed(value ? 1 : 0)} %`);
const sized = (value) => (Number.isNaN(value) ? ABSENT : size(value));
const counted = (value) => (Number.isNaN(value) ? ABSENT : String(Math.round(value)));
const ticks = { axis: (value) => `${+value.toFixed(1)} %`, least: 10, form: measured };
const bytes = { axis: (value) => size(value).replace("iB", ""), least: 1024, form: sized };
const numbers = { axis: counted, least: 4, form: counted };

// A card or a line with `only` is hidden on other systems, which do not have the figure.
const CARDS = [
  { title: "Waiting for a CPU", note: "all threads", ...ticks, lines: [{ key: "wait", label: "wait" }] },
  { title: "CPU of ended children", note: "when waited for", ...ticks, lines: [{ key: "reaped", label: "children" }] },
  { title: "Memory", ...bytes, floats: true, lines: [
    { key: "rss", label: "resident" }, { key: "anonymous", label: "anonymous", only: "linux" }, { key: "footprint", label: "footprint", only: "macos" }] },
  { title: "Swapped memory", only: "linux", ...bytes, lines: [{ key: "swap", label: "swap" }] },
  { title: "Open descriptors", ...numbers, lines: [{ key: "fds", label: "open" }] },
  { title: "Page faults with IO", note: "per sample", ...numbers, lines: [{ key: "faults", label: "faults" }] },
  { title: "Wake-ups", note: "per sample", only: "macos", ...numbers, lines: [
    { key: "idleWakeups", label: "from idle" }, { key: "interruptWakeups", label: "by interrupt" }] },
  { title: "Energy", note: "per sample", only: "macos", least: 1e6, axis: millijoules, form: millijoules, lines: [{ key: "energy", label: "energy" }] },
  { title: "CPU of the machine", note: "100 % = one core", ...ticks, lines: [{ key: "busy", label: "all" }, { key: "other", label: "other programs" }] },
  { title: "Memory of the machine", ...bytes, lines: [{ key: "available", label: "available" }, { key: "machineSwap", label: "swap in use" }] },
  { title: "Pressure", note: "some task waited", only: "linux", ...ticks, lines: [
    { key: "cpuPressure", label: "CPU" }, { key: "memoryPressure", label: "memory" }, { key: "ioPressure", label: "IO" }] },
  { title: "Memory pressure", only: "macos", text: "level" },
  { title: "Throttled by a quota", only: "linux", ...ticks, lines: [{ key: "throttled", label: "throttled" }] },
  { title: "Load average", note: "1 min", least: 1, axis: (value) => String(+value.toFixed(2)), form: (value) => (Number.isNaN(value) ? ABSENT : value.toFixed(2)),
    lines: [{ key: "load", label: "load" }] },
  { title: "Thermal state", text: "thermal" },
  { title: "CPU of the application", note: "with its children", family: true, ...ticks, lines: [{ key: "appCpu", label: "application" }] },
  { title: "Memory of the application", note: "with its children", family: true, ...bytes, lines: [{ key: "appRss", label: "resident" }] },
];

function millijoules(value) {
  return Number.isNaN(value) ? ABSENT : `${+(value / 1e6).toFixed(1)} mJ`;
}

// Return whether a column has a value in the range shown.
function isKnown(key, r) {
  for (let i = r.first; i < r.last; i++) {
    const value = samples[key][slotOf(i)];
    if (value !== null && !Number.isNaN(value)) return true;
  }
  return false;
}

function reasons(r, focus) {
  set($("digest"), digest(slotOf(focus)));
  if (!$("reasons").open) return;
  for (const card of CARDS) drawCard(card, r, focus);
  relatives(r, focus);
}

// Return the most important figures in one line, for the closed section.
function digest(slot) {
  const { wait, reaped, busy, other } = samples, known = (column) => !Number.isNaN(column[slot]);
  const parts = [];
  if (known(wait)) parts.push(`waiting for a CPU ${measured(wait[slot])}`);
  if (known(reaped)) parts.push(`children ${measured(reaped[slot])}`);
  if (known(busy)) parts.push(`machine ${measured(busy[slot])}${known(other) ? `, of it other programs ${measured(other[slot])}` : ""}`);
  return parts.join(" \u00b7 ") || "waits, children, memory and the machine";
}

function cardOf(card) {
  if (card.element) return card;
  const element = document.createElement("section"), title = document.createElement("h3"), note = document.createElement("span");
  const legend = document.createElement("ul"), canvas = document.createElement("canvas"), absent = document.createElement("p");
  element.className = "reason";
  title.textContent = card.title;
  note.className = "dim";
  note.textContent = card.note ?? "";
  title.append(note);
  legend.className = "legend";
  canvas.className = "plot";
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `${card.title} over time`);
  absent.className = "absent dim";
  for (const [i, line] of (card.lines ?? [{ key: card.text, label: "" }]).entries()) {
    const item = document.createElement("li"), swatch = document.createElement("span"), label = document.createElement("span"), value = document.createElement("span");
    swatch.className = "swatch";
    swatch.dataset.colour = card.lines ? String(i) : "";
    label.textContent = line.label;
    item.append(...(card.lines ? [swatch, label, value] : [value]));
    legend.append(item);
    line.item = item;
    line.value = value;
    if (card.text) card.value = value;
  }
  element.append(title, legend, canvas, absent);
  $("cards").append(element);
  return Object.assign(card, { element, legend, canvas, absent });
}

function drawCard(card, r, focus) {
  const { element, legend, canvas, absent } = cardOf(card);
  const slot = slotOf(focus);
  const elsewhere = (each) => each.only && each.only !== view.platform;
  const lines = (card.lines ?? []).filter((line) => isKnown(line.key, r));
  const known = card.text ? isKnown(card.text, r) : lines.length > 0;
  element.hidden = !known && (elsewhere(card) || (card.family && !view.family));
  legend.hidden = canvas.hidden = !known;
  absent.hidden = known;
  if (!known) return set(absent, view.over ? "Not in this record." : "Not available on this system.");
  if (card.text) {
    canvas.hidden = true;
    return set(card.value, samples[card.text][slot] ?? ABSENT);
  }
  for (const line of card.lines) {
    line.item.hidden = elsewhere(line) && !lines.includes(line);
    set(line.value, card.form(samples[line.key][slot]));
  }
  const frame = canvas.getBoundingClientRect();
  if (frame.bottom > -200 && frame.top < innerHeight + 200) plotLines(card, lines, r); // the others are drawn when the user scrolls
}

function plotLines(card, lines, r) {
  const { pen, width, height } = surface(card.canvas);
  const c = colours();
  const runs = columns(r, width);
  const curves = lines.map((line) => runs.map((run) => run.map(([x, from, after]) => [x, average(samples[line.key], from, after)])));
  let low = Infinity, high = 0;
  for (const [, value] of curves.flat(2))
    if (!Number.isNaN(value)) {
      low = Math.min(low, value);
      high = Math.max(high, value);
    }
  if (card.floats) {
    const spare = Math.max((high - low) * 0.15, high * 0.02);
    low = Math.max(0, low - spare);
    high += spare;
  } else {
    low = 0;
    high = nice(Math.max(high * 1.05, card.least), [1, 1.2, 1.6, 2, 2.4, 3, 4, 5, 6, 8, 10]);
  }
  axes(pen, width, height, r, low, high, card.axis, true);
  const floor = height - BOTTOM;
  const y = (value) => floor - ((value - low) / (high - low || 1)) * (floor - TOP);
  curves.forEach((curve, i) => {
    pen.strokeStyle = pen.fillStyle = c.series[card.lines.indexOf(lines[i])];
    pen.lineWidth = 1.5;
    pen.lineJoin = "round";
    pen.beginPath();
    for (const run of curve) {
      let drawn = false;
      for (const [x, value] of run) {
        if (!Number.isNaN(value)) drawn ? pen.lineTo(x, y(value)) : pen.moveTo(x, y(value));
        drawn = !Number.isNaN(value);
      }
    }
    pen.stroke();
  });
  flags(pen, width, height, r, false);
}

// Show the living children at the focus, the busiest first.
function relatives(r, focus) {
  const slot = slotOf(focus);
  const living = [...children.values()].filter((child) => !Number.isNaN(child.cpu[slot])).sort((a, b) => b.cpu[slot] - a.cpu[slot] || a.pid - b.pid);
  const unnamed = samples.appCount[slot] > 1; // a report without the consent to name them, or a record of the busiest alone
  const none = unnamed ? "This record does not name them." : view.family ? "No child process at this time." : view.over ? "Not recorded." : "Not recorded. Start the sidecar with --children to record child processes.";
  $("no-family").hidden = living.length > 0;
  $("children").hidden = !living.length;
  const count = samples.appCount[slot];
  const missed = samples.appComplete[slot] === 0 ? ", some were missed" : "";
  set($("family-title"), `Child processes${Number.isNaN(count) ? "" : ` (the application has ${count} processes${missed})`}`);
  if (!living.length) return set($("no-family"), none);
  const body = $("child-rows");
  while (body.children.length > living.length) body.lastChild.remove();
  while (body.children.length < living.length) {
    const tr = document.createElement("tr"), name = document.createElement("th"), label = document.createElement("bdi");
    name.scope = "row";
    name.append(label);
    tr.append(name, ...Array.from({ length: 3 }, () => document.createElement("td")));
    body.append(tr);
  }
  living.forEach((child, i) => {
    const [name, pid, cpu, rss] = body.children[i].children;
    set(name.firstChild, child.label);
    set(pid, String(child.pid));
    set(cpu, percent(child.cpu[slot]));
    set(rss, sized(child.rss[slot]));
  });
}
