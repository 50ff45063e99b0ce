// Keep the data of the page: the samples of the last minutes, one column per thread, and the notes.

const CAPACITY = 1200; // samples kept: 20 minutes at one a second
const IDLE = 0.05; // percent; a smaller number would be shown as 0.0
const LEAST_SPAN = 60000; // ms; shortest time axis: with few samples a shorter one would stretch them

// What explains the CPU time and the memory: for each column its place in a history, and in an answer of detail=full.
// A column that a system does not have is null in a history, and so is a single cell; here both are NaN.
const alike = (part, key) => [(table) => table[part]?.[key], (answer) => answer[part]?.[key]];
const ofProcess = (key) => [(table) => table[key], (answer) => answer.process[key]];
const growing = (key) => [(table) => table[key], (answer, before) => answer.process[key] - (before?.process[key] ?? NaN)];
const REASONS = {
  wait: ofProcess("wait_percent"), reaped: ofProcess("children_percent"), anonymous: ofProcess("anonymous_kb"),
  footprint: ofProcess("footprint_kb"), swap: ofProcess("swap_kb"), fds: ofProcess("open_fds"), faults: growing("major_faults"),
  idleWakeups: growing("idle_wakeups"), interruptWakeups: growing("interrupt_wakeups"), energy: growing("energy_nj"),
  busy: alike("machine", "cpu_percent"), other: alike("machine", "other_percent"), load: alike("machine", "load_1m"),
  available: alike("machine", "memory_available_kb"), machineSwap: alike("machine", "swap_used_kb"),
  cpuPressure: pressure("cpu"), memoryPressure: pressure("memory"), ioPressure: pressure("io"),
  throttled: alike("machine", "quota_throttled_percent"), appCpu: alike("application", "cpu_percent"),
  appRss: alike("application", "rss_kb"), appCount: alike("application", "process_count"),
  appComplete: alike("application", "complete"),
};
const TEXTS = { level: alike("machine", "memory_pressure"), thermal: alike("machine", "thermal_state") };

function pressure(kind) {
  return [(table) => table.machine?.[`${kind}_pressure_percent`], (answer) => answer.machine?.pressure_percent[kind]];
}

const samples = { n: 0, time: new Float64Array(CAPACITY), cpu: new Float32Array(CAPACITY),
  rss: new Float64Array(CAPACITY), count: new Float64Array(CAPACITY) };
for (const name of Object.keys(REASONS)) samples[name] = new Float64Array(CAPACITY).fill(NaN);
for (const name of Object.keys(TEXTS)) samples[name] = new Array(CAPACITY).fill(null);
const threads = new Map(); // tid -> {tid, name, cpu: Float32Array, wait: the same or null, last: n, colour}
const children = new Map(); // pid and name -> {pid, label, cpu: Float32Array, rss: Float64Array, last: n}
const view = { window: 300000, chosen: false, paused: false, end: 0, pin: null, hover: null, sort: "cpu", ascending: false,
  filter: "", all: false, run: "", over: false, info: null, startId: "", notes: [], uptime: null, before: null, latest: null, platform: "", family: false };

const slotOf = (number) => number % CAPACITY;
const oldest = () => Math.max(0, samples.n - CAPACITY);
const lastTime = () => (samples.n ? samples.time[slotOf(samples.n - 1)] : 0);

function resetSamples() {
  samples.n = 0;
  threads.clear();
  children.clear();
  forgetGauges();
  view.notes = [];
  view.pin = view.hover = view.uptime = view.before = view.latest = null;
}

// Add a sample. `reason` returns the value of a column of REASONS or TEXTS; `each` and `relatives` put threads and children.
function add(time, cpu, rss, count, reason, each, relatives) {
  const slot = slotOf(samples.n);
  samples.time[slot] = Math.max(time, lastTime() + 1);
  samples.cpu[slot] = cpu;
  samples.rss[slot] = rss;
  samples.count[slot] = count;
  for (const name of Object.keys(REASONS)) samples[name][slot] = reason(name) ?? NaN;
  for (const name of Object.keys(TEXTS)) samples[name][slot] = reason(name) ?? null;
  for (const thread of threads.values()) {
    thread.cpu[slot] = NaN;
    if (thread.wait) thread.wait[slot] = NaN;
  }
  each((tid, name, percent, wait) => {
    let thread = threads.get(tid);
    if (!thread) {
      thread = { tid, name, cpu: new Float32Array(CAPACITY).fill(NaN), wait: null, last: 0, colour: -1, mean: 0, peak: 0, now: 0, label: "" };
      threads.set(tid, thread);
    }
    if (thread.name !== name || !thread.label) {
      thread.name = name;
      thread.label = clean(name) || "(no name)";
    }
    thread.cpu[slot] = percent ?? NaN;
    if (wait !== null && wait !== undefined) {
      if (!thread.wait) thread.wait = new Float32Array(CAPACITY).fill(NaN);
      thread.wait[slot] = wait;
    }
    thread.last = samples.n;
  });
  for (const child of children.values()) child.cpu[slot] = child.rss[slot] = NaN;
  relatives((pid, name, percent, size) => {
    const key = `${pid} ${name}`;
    let child = children.get(key);
    if (!child) {
      child = { pid, label: clean(name) || "(no name)", cpu: new Float32Array(CAPACITY).fill(NaN), rss: new Float64Array(CAPACITY).fill(NaN), last: 0 };
      children.set(key, child);
    }
    child.cpu[slot] = percent ?? NaN;
    child.rss[slot] = size ?? NaN;
    child.last = samples.n;
  });
  samples.n += 1;
  if (samples.n % 64 === 0)
    for (const kept of [threads, children])
      for (const [key, each] of kept) if (each.last < samples.n - CAPACITY) kept.delete(key);
}

function ingest(table) {
  const from = Math.max(0, table.time_ms.length - CAPACITY);
  const last = lastTime();
  const reasons = {};
  for (const [name, [past]] of Object.entries({ ...REASONS, ...TEXTS })) reasons[name] = past(table);
  view.family = Boolean(table.application);
  for (let i = from; i < table.time_ms.length; i++)
    if (table.time_ms[i] > last)
      add(table.time_ms[i], table.cpu_percent[i], table.rss_kb[i], table.thread_count[i], (name) => reasons[name]?.[i], (put) => {
        for (const thread of table.threads)
          if (thread.cpu_percent[i] !== null) put(thread.tid, thread.name, thread.cpu_percent[i], thread.wait_percent?.[i]);
      }, (put) => {
        for (const child of table.children ?? [])
          if (child.cpu_percent[i] !== null) put(child.pid, child.name, child.cpu_percent[i], child.rss_kb[i]);
      });
  gaugesOf(table);
  annotate(table);
}

function annotate(table) {
  const known = new Map(view.notes.map((note) => [note.key, note]));
  for (const mark of table.marks)
    note(known, { time: mark.time_ms, end: mark.time_ms, kind: "mark", text: clean(mark.label) });
  for (const event of table.events)
    note(known, event.kind === "hang" ? hangOf(event) : { time: event.time_ms, end: event.time_ms, kind: event.kind, text: clean(event.detail) });
  view.notes.sort((a, b) => a.time - b.time);
}

function note(known, entry) {
  entry.key = `${entry.time} ${entry.kind} ${entry.heartbeat ?? entry.text}`;
  const before = known.get(entry.key);
  if (before) Object.assign(before, entry); // a hang that goes on
  else view.notes.push(entry);
}

// Escape invisible characters and those that change the direction of text.
function clean(text) {
  return text.replace(/[\p{C}\p{Zl}\p{Zp}]/gu, (c) => "\\u{" + c.codePointAt(0).toString(16) + "}");
}

// Return the range of samples to show: the selected window, or all samples if there are fewer.
function range() {
  const end = view.paused ? view.end : lastTime();
  const known = samples.n ? end - samples.time[slotOf(oldest())] : 0;
  const start = end - (view.window ? Math.min(view.window, Math.max(known, LEAST_SPAN)) : known);
  let first = samples.n, last = samples.n;
  while (last > oldest() && samples.time[slotOf(last - 1)] > end) last--;
  first = last;
  while (first > oldest() && samples.time[slotOf(first - 1)] >= start) first--;
  return { start, end: Math.max(end, start + 1), first, last };
}

// Return mean, peak and current value of each thread in the range shown.
function weigh(r, focus) {
  for (const thread of threads.values()) {
    let sum = 0, peak = 0;
    const { cpu } = thread;
    for (let i = r.first; i < r.last; i++) {
      const value = cpu[i % CAPACITY];
      if (value > 0) {
        sum += value;
        if (value > peak) peak = value;
      }
    }
    thread.mean = sum / (r.last - r.first);
    thread.peak = peak;
    const now = cpu[focus % CAPACITY];
    thread.now = now;
    thread.waits = thread.wait ? thread.wait[focus % CAPACITY] : NaN;
    thread.idle = idleTime(cpu, r, focus);
    const before = focus > r.first ? cpu[(focus - 1) % CAPACITY] : now;
    // Mean of two samples, so that threads that alternate do not swap rows every second.
    thread.rank = Number.isNaN(now) ? -1 : now + (before > 0 ? before : 0) / 2;
  }
}

// Return the time from the last activity of a thread to the focus, ms; 0 if it is active there or never in the range.
function idleTime(cpu, r, focus) {
  let i = focus;
  while (i >= r.first && cpu[i % CAPACITY] < IDLE) i--;
  return i < r.first || i === focus || Number.isNaN(cpu[i % CAPACITY]) ? 0 : samples.time[slotOf(focus)] - samples.time[slotOf(i)];
}

function nearest(time, r) {
  let low = r.first, high = r.last - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (samples.time[slotOf(middle)] < time) low = middle + 1;
    else high = middle;
  }
  if (low > r.first && time - samples.time[slotOf(low - 1)] < samples.time[slotOf(low)] - time) low--;
  return low;
}

function median(r) {
  const few = [];
  const stride = Math.max(1, Math.floor((r.last - r.first) / 15));
  for (let i = r.first + 1; i < r.last; i += stride) few.push(samples.time[slotOf(i)] - samples.time[slotOf(i - 1)]);
  few.sort((a, b) => a - b);
  return few.length ? few[few.length >> 1] : 1000;
}

// Return the mean of the known values, or NaN if there is none.
function average(array, from, after) {
  let sum = 0, known = 0;
  for (let i = from; i < after; i++) {
    const value = array[i % CAPACITY];
    if (Number.isNaN(value)) continue;
    sum += value;
    known += 1;
  }
  return known ? sum / known : NaN;
}

function mean(array, from, after) {
  let sum = 0;
  for (let i = from; i < after; i++) {
    const value = array[i % CAPACITY];
    if (value > 0) sum += value;
  }
  return sum / (after - from);
}
