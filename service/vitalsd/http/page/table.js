// Show the threads: rows are created once, only changed cells are written, and only visible plots are drawn.

const ROWS = 60;
const pool = [];
function row(i) {
  if (pool[i]) return pool[i];
  const tr = document.createElement("tr");
  const cell = (tag, ...classes) => {
    const element = document.createElement(tag);
    element.className = classes.join(" ");
    return element;
  };
  const name = cell("th"), nameCell = cell("div", "cell"), swatch = cell("span", "swatch"), label = document.createElement("bdi");
  nameCell.append(swatch, label);
  name.scope = "row";
  name.append(nameCell);
  const tid = cell("td", "wide"), cpu = cell("td", "cpu"), cpuCell = cell("div", "cell"), meter = cell("span", "meter"), fill = document.createElement("i"), figure = cell("span", "figure");
  meter.append(fill);
  cpuCell.append(meter, figure);
  cpu.append(cpuCell);
  const wait = cell("td", "wide"), average = cell("td", "wide"), peak = cell("td", "wide"), past = cell("td"), spark = document.createElement("canvas");
  spark.className = "spark";
  spark.setAttribute("aria-hidden", "true");
  past.append(spark);
  tr.append(name, tid, cpu, wait, average, peak, past);
  return (pool[i] = { tr, label, swatch, tid, fill, figure, wait, average, peak, spark, drawn: "" });
}

function table(r, focus) {
  const needle = view.filter.toLowerCase();
  let list = [...threads.values()].filter((thread) =>
    (!Number.isNaN(thread.now) || thread.last === focus || (thread.peak > 0 && view.pin === null && thread.last >= r.first)) &&
    (!needle || thread.label.toLowerCase().includes(needle) || String(thread.tid).startsWith(needle)));
  const by = {
    cpu: (a, b) => a.rank - b.rank,
    wait: (a, b) => (Number.isNaN(a.waits) ? -1 : a.waits) - (Number.isNaN(b.waits) ? -1 : b.waits),
    mean: (a, b) => a.mean - b.mean,
    peak: (a, b) => a.peak - b.peak,
    tid: (a, b) => a.tid - b.tid,
    name: (a, b) => (a.label < b.label ? -1 : a.label > b.label ? 1 : 0),
  }[view.sort];
  const sign = view.ascending ? 1 : -1;
  list.sort((a, b) => sign * by(a, b) || b.mean - a.mean || a.tid - b.tid);
  const total = list.length;
  if (!view.all) list = list.slice(0, ROWS);
  const body = $("rows");
  const ratio = devicePixelRatio || 1;
  let high = 5;
  for (const thread of threads.values()) high = Math.max(high, thread.peak);
  const scale = Math.max(100, high);
  const frame = body.getBoundingClientRect();
  const pitch = body.children.length ? frame.height / body.children.length : 29;
  const wide = list.length && body.children.length ? row(0).spark.clientWidth : 120;
  list.forEach((thread, i) => {
    const line = row(i);
    if (line.tr.parentNode !== body) body.append(line.tr);
    const unknown = Number.isNaN(thread.now), gone = unknown && thread.last < focus, idle = unknown || thread.now < IDLE;
    set(line.label, thread.label);
    if (line.label.title !== thread.label) line.label.title = thread.label;
    set(line.tid, String(thread.tid));
    const since = idle && view.over && thread.idle >= 1000 ? ` ${duration(thread.idle / 1000)}` : "";
    set(line.figure, gone ? "ended" : unknown ? "\u2013" : `${percent(thread.now)}${since}`);
    set(line.wait, measured(thread.waits));
    set(line.average, thread.mean < IDLE ? "\u2013" : `${thread.mean.toFixed(1)} %`);
    set(line.peak, thread.peak < IDLE ? "\u2013" : `${thread.peak.toFixed(1)} %`);
    const kind = gone ? "gone" : idle ? "idle" : "";
    if (line.tr.className !== kind) line.tr.className = kind;
    const colour = thread.colour < 0 ? "" : String(thread.colour);
    if (line.swatch.dataset.colour !== colour) line.swatch.dataset.colour = colour;
    const part = idle ? 0 : Math.min(1, thread.now / scale);
    if (line.part !== part) line.fill.style.transform = `scaleX(${(line.part = part)})`;
    const y = frame.top + i * pitch;
    if (y > -60 && y < innerHeight + 60) sparkline(line, thread, r, high, wide, ratio); // the others are drawn when the user scrolls
  });
  while (body.children.length > list.length) body.lastChild.remove();
  $("more").hidden = total <= ROWS;
  set($("all"), view.all ? `Show the first ${ROWS}` : `Show all ${total} threads`);
  const span = r.end - r.start;
  set($("spark-head"), innerWidth <= 640 ? "Last" : `Last ${duration(Math.round(span / 1000))}`);
  const none = !total;
  $("none").hidden = !none;
  if (none) set($("none"), needle ? "No thread matches this name or id." : "No threads.");
}

function sparkline(line, thread, r, high, wide, ratio) {
  const key = thread.peak < IDLE ? "" : `${thread.tid} ${r.first} ${r.last} ${r.end} ${high} ${wide} ${colours().ink}`;
  if (line.drawn === key) return;
  line.drawn = key;
  const canvas = line.spark;
  const width = Math.round(wide * ratio), height = Math.round(22 * ratio);
  if (canvas.width !== width) canvas.width = width;
  if (canvas.height !== height) canvas.height = height;
  const pen = canvas.getContext("2d");
  pen.clearRect(0, 0, width, height);
  if (!key) return;
  const count = r.last - r.first;
  const per = Math.max(1, Math.ceil(count / 90));
  const span = r.end - r.start;
  const y = (value) => height - 1 - (value / high) * (height - 3);
  pen.strokeStyle = pen.fillStyle = thread.colour < 0 ? colours().dim : colours().series[thread.colour];
  pen.lineWidth = ratio;
  pen.beginPath();
  let first = null, last = 0;
  for (let i = r.first; i < r.last; i += per) {
    const after = Math.min(r.last, i + per);
    last = ((samples.time[slotOf(after - 1)] - r.start) / span) * width;
    if (first === null) first = last;
    pen.lineTo(last, y(mean(thread.cpu, i, after)));
  }
  pen.stroke();
  pen.lineTo(last, height);
  pen.lineTo(first, height);
  pen.globalAlpha = 0.18;
  pen.fill();
  pen.globalAlpha = 1;
}
