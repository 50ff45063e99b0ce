// Show what the application signals: heartbeats, hangs on the time axis, and gauges. Without any of them, nothing.

const beats = new Map(); // name -> what /heartbeats says
const gauges = new Map(); // name -> {name, times: [], values: [], card}

const seconds = (ms) => (ms < 60000 ? `${(ms / 1000).toFixed(1)} s` : duration(ms / 1000));
const reasonOf = ({ cause, detail }) => [cause && cause.replaceAll("_", " "), clean(detail)].filter(Boolean).join(", ");

function hangOf(event) {
  return { time: event.time_ms, end: event.time_ms + event.duration_ms, kind: "hang", text: reasonOf(event),
    heartbeat: clean(event.heartbeat), ongoing: event.ongoing };
}

// Return whether a hang lasts now; one that lasted when its record ended does not.
function goesOn(note) {
  return Boolean(note.ongoing) && !view.over;
}

// Return the time at which a note ends in the charts, ms: a hang that lasts reaches to the newest sample.
function lasts(note) {
  return goesOn(note) ? Math.max(note.end, lastTime()) : note.end;
}

function inWords(note) {
  if (note.kind !== "hang") return note.text;
  const so = !note.ongoing ? "" : view.over ? " until the record ended" : " so far";
  return `${note.heartbeat} silent for ${seconds(note.end - note.time)}${so}${note.text && `: ${note.text}`}`;
}

// Draw a hang over a plot: a span with a bar below the axis, which has no end as long as the hang lasts.
function hangSpan(pen, from, to, height, goes) {
  const width = Math.max(2, to - from), floor = height - BOTTOM;
  pen.globalAlpha = goes ? 0.22 : 0.14;
  pen.fillRect(from, TOP, width, floor - TOP);
  pen.globalAlpha = 1;
  pen.fillRect(from, floor, width, 3);
  pen.setLineDash(goes ? [4, 3] : []);
  pen.beginPath();
  for (const x of goes ? [from] : [from, from + width]) {
    pen.moveTo(x, TOP);
    pen.lineTo(x, floor);
  }
  pen.lineWidth = 1;
  pen.stroke();
  pen.setLineDash([]);
}

// Poll the heartbeats: once a second while there are any. The stream shows whether the sidecar answers.
async function listenForBeats() {
  for (let waited = 5; ; waited += 1) {
    await pause(1000);
    if (heard === null || view.run || document.hidden) {
      showBeats([]);
      waited = 5; // ask at once when the sidecar answers again
      continue;
    }
    if (!beats.size && waited < 5) continue;
    waited = 0;
    try {
      const mine = generation;
      const found = await json("/heartbeats");
      if (mine === generation) showBeats(found);
    } catch {
      // the stream fails too, and live() shows the error
    }
  }
}

function showBeats(found) {
  const list = $("heartbeats");
  $("beats").hidden = !found.length;
  beats.clear();
  for (const beat of found) beats.set(beat.name, beat);
  while (list.children.length > found.length) list.lastChild.remove();
  while (list.children.length < found.length) {
    const item = document.createElement("li"), text = document.createElement("bdi");
    item.append(text);
    list.append(item);
  }
  found.forEach((beat, i) => {
    const item = list.children[i], why = reasonOf(beat);
    if (item.dataset.state !== beat.state) item.dataset.state = beat.state;
    const silent = `${clean(beat.name)} silent for ${seconds(beat.silent_ms)}${why && `: ${why}`}`;
    set(item.firstChild, beat.state === "silent" ? silent : `${clean(beat.name)} ${beat.state}`);
  });
}

function forgetGauges() {
  gauges.clear();
  $("gauge-cards").replaceChildren();
}

// Take the gauges of a history. They have points of their own, because the stream does not contain them.
function gaugesOf(table) {
  for (const { name, value } of table.gauges ?? []) {
    let gauge = gauges.get(name);
    if (!gauge) gauges.set(name, (gauge = { name, times: [], values: [], card: null }));
    const { times, values } = gauge;
    for (const [i, time] of table.time_ms.entries()) {
      if (times.length && time <= times[times.length - 1]) continue;
      // Downsample a long recording, as take() does.
      if (times.length > 1 && time - times[times.length - 2] < spacing(view.info)) times.pop(), values.pop();
      times.push(time);
      values.push(value[i] ?? NaN);
    }
    const spare = times.length - CAPACITY;
    if (spare > 0) times.splice(0, spare), values.splice(0, spare);
  }
}

function plotGauges(r, focus) {
  const at = samples.time[slotOf(focus)];
  let any = false;
  for (const gauge of gauges.values()) {
    const points = gauge.times.map((time, i) => [time, gauge.values[i]]).filter(([time]) => time >= r.start && time <= r.end);
    const known = points.filter(([, value]) => !Number.isNaN(value));
    gaugeCard(gauge).element.hidden = !known.length;
    if (!known.length) continue;
    any = true;
    $("gauges").hidden = false; // before the plot is measured
    const last = points.findLast(([time]) => time <= at + median(r)) ?? [0, NaN];
    set(gauge.card.value, figure(last[1]));
    plotGauge(gauge.card.canvas, points, known, r);
  }
  $("gauges").hidden = !any;
}

function figure(value) {
  if (Number.isNaN(value)) return ABSENT;
  const large = Math.abs(value) >= 1e6 || (value !== 0 && Math.abs(value) < 1e-3);
  return large ? value.toExponential(2) : String(+value.toPrecision(4));
}

const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });
function tickOf(value) {
  return value !== 0 && Math.abs(value) < 1e-3 ? value.toExponential(0) : compact.format(value);
}

function gaugeCard(gauge) {
  if (gauge.card) return gauge.card;
  const element = document.createElement("section"), title = document.createElement("h3"), name = document.createElement("bdi");
  const value = document.createElement("span"), canvas = document.createElement("canvas");
  element.className = "reason";
  name.textContent = clean(gauge.name);
  value.className = "dim";
  title.append(name, value);
  canvas.className = "plot";
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `${clean(gauge.name)} over time`);
  element.append(title, canvas);
  $("gauge-cards").append(element);
  return (gauge.card = { element, value, canvas });
}

function plotGauge(canvas, points, known, r) {
  const { pen, width, height } = surface(canvas);
  let low = Infinity, high = -Infinity;
  for (const [, value] of known) {
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  const spare = Math.max((high - low) * 0.1, Math.abs(high) * 0.02) || 1;
  low -= low >= 0 && low < spare ? low : spare;
  high += spare;
  axes(pen, width, height, r, low, high, tickOf, true);
  const floor = height - BOTTOM, gap = 2.6 * median(r);
  pen.strokeStyle = colours().series[0];
  pen.lineWidth = 1.5;
  pen.lineJoin = pen.lineCap = "round"; // one value alone is a dot
  pen.beginPath();
  let before = null;
  for (const [time, value] of points) {
    if (Number.isNaN(value)) {
      before = null;
      continue;
    }
    const x = LEFT + ((time - r.start) / (r.end - r.start)) * (width - LEFT), y = floor - ((value - low) / (high - low)) * (floor - TOP);
    if (before === null || time - before > gap) pen.moveTo(x, y);
    pen.lineTo(x, y);
    before = time;
  }
  pen.stroke();
  flags(pen, width, height, r, false);
}
