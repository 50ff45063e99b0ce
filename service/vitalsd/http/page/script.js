"use strict";
// Names of threads come from whoever wrote the program: they only ever reach textContent or fillText, and the
// policy of this page (Trusted Types, none allowed) would refuse anything else.
(() => {
  const $ = (id) => document.getElementById(id);
  const CAPACITY = 1200; // samples kept: 20 minutes at one a second
  const COLOURS = 8;
  const ROWS = 60;
  const IDLE = 0.05; // percent; below it a figure would round to 0.0
  const HISTORY_THREADS = 64;

  // What is known

  const samples = { n: 0, time: new Float64Array(CAPACITY), cpu: new Float32Array(CAPACITY),
    rss: new Float64Array(CAPACITY), count: new Float64Array(CAPACITY) };
  const threads = new Map(); // tid -> {tid, name, cpu: Float32Array, last: n, colour}
  const view = { window: 300000, paused: false, pin: null, hover: null, sort: "cpu", ascending: false, filter: "",
    all: false, run: "", mode: "wait", info: null, notes: [], end: 0 };
  let token = sessionStorage.getItem("vitalsd-token");
  const fragment = new URLSearchParams(location.hash.slice(1)).get("token");
  if (fragment) {
    token = fragment;
    sessionStorage.setItem("vitalsd-token", token);
    history.replaceState(null, "", location.pathname + location.search);
  }

  const slotOf = (number) => number % CAPACITY;
  const oldest = () => Math.max(0, samples.n - CAPACITY);
  const lastTime = () => (samples.n ? samples.time[slotOf(samples.n - 1)] : 0);

  function forget() {
    samples.n = 0;
    threads.clear();
    view.notes = [];
    view.pin = view.hover = null;
  }

  function add(time, cpu, rss, count, each) {
    const slot = slotOf(samples.n);
    samples.time[slot] = Math.max(time, lastTime() + 1);
    samples.cpu[slot] = cpu;
    samples.rss[slot] = rss;
    samples.count[slot] = count;
    for (const thread of threads.values()) thread.cpu[slot] = NaN;
    each((tid, name, percent) => {
      let thread = threads.get(tid);
      if (!thread) {
        thread = { tid, name, cpu: new Float32Array(CAPACITY).fill(NaN), last: 0, colour: -1, mean: 0, peak: 0, now: 0, label: "" };
        threads.set(tid, thread);
      }
      if (thread.name !== name || !thread.label) {
        thread.name = name;
        thread.label = clean(name) || "(no name)";
      }
      thread.cpu[slot] = percent;
      thread.last = samples.n;
    });
    samples.n += 1;
    if (samples.n % 64 === 0)
      for (const [tid, thread] of threads) if (thread.last < samples.n - CAPACITY) threads.delete(tid);
  }

  function ingest(table) {
    const from = Math.max(0, table.time_ms.length - CAPACITY);
    const last = lastTime();
    for (let i = from; i < table.time_ms.length; i++)
      if (table.time_ms[i] > last)
        add(table.time_ms[i], table.cpu_percent[i], table.rss_kb[i], table.thread_count[i], (put) => {
          for (const thread of table.threads) if (thread.cpu_percent[i] !== null) put(thread.tid, thread.name, thread.cpu_percent[i]);
        });
    annotate(table);
  }

  function annotate(table) {
    const known = new Set(view.notes.map((note) => note.key));
    for (const mark of table.marks)
      note(known, { time: mark.time_ms, kind: "mark", text: clean(mark.label) });
    for (const event of table.events)
      note(known, { time: event.time_ms, kind: event.kind, text: clean(event.detail) });
    view.notes.sort((a, b) => a.time - b.time);
  }

  function note(known, entry) {
    entry.key = `${entry.time} ${entry.kind} ${entry.text}`;
    if (!known.has(entry.key)) view.notes.push(entry);
  }

  // What hides, what turns the direction of writing round: spelled out.
  function clean(text) {
    return text.replace(/[\p{C}\p{Zl}\p{Zp}]/gu, (c) => "\\u{" + c.codePointAt(0).toString(16) + "}");
  }

  // Where it comes from

  const pause = (ms) => new Promise((done) => setTimeout(done, ms));

  async function ask(path, options = {}) {
    const headers = { ...(options.headers || {}) };
    if (token) headers.Authorization = "Bearer " + token;
    const answer = await fetch(path, { ...options, headers, cache: "no-store" });
    if (answer.status === 401) {
      $("token-form").hidden = false;
      status("gone", "a token is needed");
      await new Promise((done) => $("token-form").addEventListener("submit", done, { once: true }));
      return ask(path, options);
    }
    return answer;
  }

  async function json(path) {
    const answer = await ask(path);
    if (!answer.ok) throw new Error(`${path}: ${answer.status}`);
    return answer.json();
  }

  let reading = null; // aborts the stream
  let generation = 0; // of what is being looked at; an older one ends by itself

  async function live() {
    const mine = ++generation;
    let wait = 500;
    while (mine === generation) {
      try {
        const info = await json("/info");
        if (mine !== generation) return;
        identify(info);
        if (info.recorder) ingest(await json(`/history?seconds=${reach(info)}&top=${HISTORY_THREADS}&step_ms=${step(info)}`));
        const over = info.recorder && info.recorder.ended;
        if (over || info.target.available === false) {
          const replay = Boolean(over) && !("max_bytes" in info.recorder);
          status(replay ? "past" : "gone", replay ? "replay" : over ? "target has ended" : "no target");
          banner(over || info.target.reason);
          if (replay && view.window !== 0 && !view.chosen) choose(0);
          draw();
          $("mark").disabled = $("pause").disabled = true;
          if (replay) return;
          await pause(3000);
          continue;
        }
        $("mark").disabled = $("pause").disabled = false;
        banner("");
        wait = 500;
        await follow(mine);
      } catch (error) {
        if (mine !== generation) return;
        if (error.name !== "TypeError" && error.name !== "AbortError" && !(error instanceof Error)) throw error;
      }
      if (mine !== generation) return;
      status("wait", "reconnecting");
      await pause(wait);
      wait = Math.min(4000, wait * 1.6);
    }
  }

  function reach(info) {
    return "max_bytes" in info.recorder ? 900 : 86400;
  }

  // Just under a second, so that snapshots a second apart are not taken two by two.
  function step(info) {
    const span = info.recorder.snapshots * info.recorder.interval_ms;
    return "max_bytes" in info.recorder ? 950 : Math.floor(span / CAPACITY);
  }

  async function follow(mine) {
    reading = new AbortController();
    const answer = await ask("/stream?interval_ms=1000", { signal: reading.signal });
    if (!answer.ok) throw new Error("no stream");
    status("live", view.paused ? "paused" : "live");
    const lines = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    for (;;) {
      const { value, done } = await lines.read();
      if (done || mine !== generation) return;
      text += value;
      let end;
      while ((end = text.indexOf("\n\n")) >= 0) {
        const event = text.slice(0, end);
        text = text.slice(end + 2);
        const at = event.indexOf("data: ");
        if (at >= 0) take(JSON.parse(event.slice(at + 6)));
      }
    }
  }

  function take(answer) {
    if (answer.available === false) return;
    const { process } = answer;
    add(Date.now(), process.cpu_percent, process.rss_kb, answer.threads.length, (put) => {
      for (const thread of answer.threads) put(thread.tid, thread.name, thread.cpu_percent);
    });
    view.uptime = process.uptime_secs;
    view.vm = process.vm_size_kb;
    draw();
  }

  async function look() {
    for (;;) {
      await pause(2000);
      if (document.hidden || view.run || $("status").dataset.kind !== "live") continue;
      try {
        const mine = generation;
        const info = await json("/info");
        if (info.recorder) {
          const table = await json("/history?seconds=30&top=0");
          if (mine === generation) annotate(table);
        }
        view.info = info;
        own(info);
      } catch {
        // the stream notices too, and says so
      }
    }
  }

  function identify(info) {
    const before = view.info && view.info.target.start_id;
    if (before && info.target.start_id && before !== info.target.start_id) forget();
    view.info = info;
    show(info.target, info.platform);
    own(info);
  }

  function show(target, platform) {
    const name = target.name ? clean(target.name) : "no target";
    $("name").textContent = name;
    document.title = `${name} \u2013 vitalsd`;
    $("target").textContent = target.pid ? `pid ${target.pid} \u00b7 ${platform} \u00b7 since ${new Date(target.started_at).toLocaleString([], { dateStyle: "medium", timeStyle: "medium" })}` : "";
  }

  function own(info) {
    const now = performance.now();
    let cost = "";
    if (view.own && view.own.pid === info.self.pid && now > view.own.at)
      cost = ` \u00b7 uses ${(100000 * (info.self.cpu_secs - view.own.cpu) / (now - view.own.at)).toFixed(1)} % CPU`;
    view.own = { pid: info.self.pid, cpu: info.self.cpu_secs, at: now };
    const recorder = info.recorder && info.recorder.retention_secs
      ? ` \u00b7 records every ${info.recorder.interval_ms} ms, ${Math.round(info.recorder.retention_secs / 60)} min back` : "";
    $("own").textContent = `vitalsd ${info.version}${cost}, ${size(info.self.peak_rss_kb)} at most${recorder}`;
  }

  async function listRuns() {
    let runs = [];
    try {
      runs = await json("/runs");
    } catch {
      return;
    }
    runs = runs.filter((run) => run.state !== "running" && run.snapshots > 1).slice(0, 30);
    if (!runs.length) return;
    const options = runs.map((run) => {
      const option = document.createElement("option");
      option.value = run.id;
      option.textContent = `${run.state === "crashed" ? "crashed" : "ended"} \u00b7 ${clean(run.name)} \u00b7 ${new Date(run.recorded_to).toLocaleString()}`;
      return option;
    });
    const now = document.createElement("option");
    now.value = "";
    now.textContent = "Now";
    $("run").replaceChildren(now, ...options);
    $("run-label").hidden = false;
    $("run").addEventListener("change", () => openRun($("run").value, runs));
  }

  async function openRun(id, runs) {
    view.run = id;
    if (reading) reading.abort();
    forget();
    if (!id) {
      view.info = null;
      live();
      return;
    }
    const mine = ++generation;
    const run = runs.find((each) => each.id === id);
    const span = Date.parse(run.recorded_to) - Date.parse(run.recorded_from);
    const table = await json(`/runs/${encodeURIComponent(id)}/history?seconds=86400&top=${HISTORY_THREADS}&step_ms=${Math.floor(span / CAPACITY)}`);
    if (mine !== generation) return;
    ingest(table);
    show(table.target, table.platform);
    status("past", "earlier run");
    banner(run.state === "crashed" ? `This run did not end well${run.ended ? ": " + run.ended : ""}.` : `This run has ended${run.ended ? ": " + run.ended : ""}.`);
    $("mark").disabled = $("pause").disabled = true;
    choose(0);
  }

  // What is shown

  function status(kind, text) {
    const element = $("status");
    if (element.dataset.kind !== kind) element.dataset.kind = kind;
    if (element.textContent !== text) element.textContent = text;
  }

  function banner(text) {
    $("banner").hidden = !text;
    $("banner").textContent = clean(text);
  }

  function set(element, text) {
    if (element.shown !== text) element.textContent = element.shown = text;
  }

  const percent = (value) => (value < IDLE ? "idle" : `${value.toFixed(1)} %`);

  function size(kb) {
    if (kb < 10240) return `${kb.toFixed(0)} KiB`;
    if (kb < 10485760) return `${(kb / 1024).toFixed(kb < 102400 ? 1 : 0)} MiB`;
    return `${(kb / 1048576).toFixed(1)} GiB`;
  }

  function duration(seconds) {
    const s = Math.floor(seconds);
    if (s < 60) return `${s} s`;
    if (s < 3600) return `${Math.floor(s / 60)} min ${s % 60} s`;
    if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor(s / 60) % 60} min`;
    return `${Math.floor(s / 86400)} d ${Math.floor(s / 3600) % 24} h`;
  }

  const clocks = new Map(); // second -> text: formatting a time costs more than drawing it
  function clock(time) {
    const second = Math.floor(time / 1000);
    let text = clocks.get(second);
    if (text === undefined) {
      if (clocks.size > 4000) clocks.clear();
      text = new Date(time).toTimeString().slice(0, 8);
      clocks.set(second, text);
    }
    return text;
  }

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

  let scheduled = false;
  function draw() {
    if (scheduled || document.hidden) return;
    scheduled = true;
    requestAnimationFrame(() => {
      scheduled = false;
      render();
    });
  }

  function range() {
    const end = view.paused ? view.end : lastTime();
    const start = view.window ? end - view.window : samples.n ? samples.time[slotOf(oldest())] : end;
    let first = samples.n, last = samples.n;
    while (last > oldest() && samples.time[slotOf(last - 1)] > end) last--;
    first = last;
    while (first > oldest() && samples.time[slotOf(first - 1)] >= start) first--;
    return { start, end: Math.max(end, start + 1), first, last };
  }

  let shown = null; // the last range and what was worked out for it

  function render() {
    const r = range();
    if (r.last === r.first) return;
    const focus = view.pin === null ? r.last - 1 : Math.min(r.last - 1, Math.max(r.first, nearest(view.pin, r)));
    weigh(r, focus);
    const busiest = palette();
    shown = { r, busiest, focus };
    tiles(r, focus);
    plotCpu(r, busiest);
    plotRss(r);
    legend(busiest);
    table(r, focus);
    notes();
    point();
  }

  // Mean, peak and present figure of each thread over the time shown.
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
      const before = focus > r.first ? cpu[(focus - 1) % CAPACITY] : now;
      // Two samples together, so that threads that take turns do not swap places every second.
      thread.rank = Number.isNaN(now) ? -1 : now + (before > 0 ? before : 0) / 2;
    }
  }

  // A thread keeps its colour as long as it is among the busiest.
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

  function tiles(r, focus) {
    const slot = slotOf(focus);
    let low = Infinity, high = 0;
    for (let i = r.first; i < r.last; i++) {
      const value = samples.rss[slotOf(i)];
      if (value < low) low = value;
      if (value > high) high = value;
    }
    let busy = 0;
    for (const thread of threads.values()) if (thread.now >= IDLE) busy++;
    set($("cpu"), `${samples.cpu[slot].toFixed(1)} %`);
    set($("cpu-note"), view.info && !view.run ? `of ${100 * view.info.cpu_count} %` : "");
    set($("rss"), size(samples.rss[slot]));
    set($("rss-note"), `${size(low)} to ${size(high)}`);
    set($("count"), String(samples.count[slot]));
    set($("count-note"), `${busy} busy`);
    if (view.uptime === undefined) {
      set($("uptime"), duration((r.end - r.start) / 1000));
      set($("uptime-note"), "recorded");
    } else {
      set($("uptime"), duration(view.uptime));
    }
    set($("at"), view.pin === null ? "" : `at ${clock(samples.time[slot])}`);
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
    for (const note of view.notes) {
      if (note.time < r.start || note.time > r.end) continue;
      const x = Math.round(LEFT + ((note.time - r.start) / span) * (width - LEFT)) + 0.5;
      note.x = x;
    }
  }

  function flags(pen, width, height, r, labels) {
    const c = colours();
    pen.font = "11px system-ui, sans-serif";
    pen.textBaseline = "top";
    let room = -1;
    for (const note of view.notes) {
      if (note.time < r.start || note.time > r.end) continue;
      const mark = note.kind === "mark";
      pen.strokeStyle = pen.fillStyle = mark ? c.accent : note.kind === "exited" ? c.bad : c.warn;
      pen.setLineDash(mark ? [] : [2, 3]);
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
      if (!labels) continue;
      let text = mark ? note.text : note.kind;
      if (text.length > 24) text = text.slice(0, 23) + "\u2026";
      const wide = pen.measureText(text).width;
      const left = note.x + wide + 12 > width;
      const from = left ? note.x - wide - 10 : note.x;
      if (from < room) continue;
      room = from + wide + 14;
      const ink = pen.fillStyle;
      pen.fillStyle = c.card;
      pen.globalAlpha = 0.88;
      pen.fillRect(from + 1, TOP, wide + 9, 15);
      pen.globalAlpha = 1;
      pen.fillStyle = ink;
      pen.textAlign = "left";
      pen.fillText(text, from + 5, TOP + 2);
    }
  }

  // One point per pixel at most, as [x, first, after): a long time is drawn as the means of its parts.
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

  function median(r) {
    const few = [];
    const stride = Math.max(1, Math.floor((r.last - r.first) / 15));
    for (let i = r.first + 1; i < r.last; i += stride) few.push(samples.time[slotOf(i)] - samples.time[slotOf(i - 1)]);
    few.sort((a, b) => a - b);
    return few.length ? few[few.length >> 1] : 1000;
  }

  function mean(array, from, after) {
    let sum = 0;
    for (let i = from; i < after; i++) {
      const value = array[i % CAPACITY];
      if (value > 0) sum += value;
    }
    return sum / (after - from);
  }

  function plotCpu(r, busiest) {
    const { pen, width, height } = surface($("cpu-plot"));
    const c = colours();
    const runs = columns(r, width);
    let top = 10;
    for (const run of runs) for (const [, from, after] of run) top = Math.max(top, mean(samples.cpu, from, after));
    const high = nice(top * 1.05, [1, 1.5, 2, 3, 4, 5, 8, 10]);
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
    // The axis need not begin at zero: a leak of one percent is to be seen. It says where it begins.
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
    const wanted = [...busiest.map((thread) => [String(thread.colour), thread.label]), ["other", "other and ended threads"]];
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

  // The table

  const pool = [];
  function row(i) {
    if (pool[i]) return pool[i];
    const tr = document.createElement("tr");
    const cell = (tag, ...classes) => {
      const element = document.createElement(tag);
      element.className = classes.join(" ");
      return element;
    };
    const name = cell("td"), nameCell = cell("div", "cell"), swatch = cell("span", "swatch"), label = document.createElement("bdi");
    nameCell.append(swatch, label);
    name.append(nameCell);
    const tid = cell("td", "wide"), cpu = cell("td", "cpu"), cpuCell = cell("div", "cell"), meter = cell("span", "meter"), fill = document.createElement("i"), figure = cell("span", "figure");
    meter.append(fill);
    cpuCell.append(meter, figure);
    cpu.append(cpuCell);
    const average = cell("td", "wide"), peak = cell("td", "wide"), past = cell("td"), spark = document.createElement("canvas");
    spark.className = "spark";
    spark.setAttribute("aria-hidden", "true");
    past.append(spark);
    tr.append(name, tid, cpu, average, peak, past);
    return (pool[i] = { tr, label, swatch, tid, fill, figure, average, peak, spark, drawn: "" });
  }

  function table(r, focus) {
    const needle = view.filter.toLowerCase();
    let list = [...threads.values()].filter((thread) =>
      (!Number.isNaN(thread.now) || (thread.peak > 0 && view.pin === null && thread.last >= r.first)) &&
      (!needle || thread.label.toLowerCase().includes(needle) || String(thread.tid).startsWith(needle)));
    const by = {
      cpu: (a, b) => a.rank - b.rank,
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
    const top = body.getBoundingClientRect().top;
    const wide = list.length && body.children.length ? row(0).spark.clientWidth : 120;
    list.forEach((thread, i) => {
      const line = row(i);
      if (line.tr.parentNode !== body) body.append(line.tr);
      const y = top + i * 28;
      if (y < -60 || y > innerHeight + 60) return; // out of sight; scrolling draws it
      const gone = Number.isNaN(thread.now), idle = gone || thread.now < IDLE;
      set(line.label, thread.label);
      if (line.label.title !== thread.label) line.label.title = thread.label;
      set(line.tid, String(thread.tid));
      set(line.figure, gone ? "ended" : percent(thread.now));
      set(line.average, thread.mean < IDLE ? "\u2013" : `${thread.mean.toFixed(1)} %`);
      set(line.peak, thread.peak < IDLE ? "\u2013" : `${thread.peak.toFixed(1)} %`);
      const kind = gone ? "gone" : idle ? "idle" : "";
      if (line.tr.className !== kind) line.tr.className = kind;
      const colour = thread.colour < 0 ? "" : String(thread.colour);
      if (line.swatch.dataset.colour !== colour) line.swatch.dataset.colour = colour;
      const part = idle ? 0 : Math.min(1, thread.now / scale);
      if (line.part !== part) line.fill.style.transform = `scaleX(${(line.part = part)})`;
      sparkline(line, thread, r, high, wide, ratio);
    });
    while (body.children.length > list.length) body.lastChild.remove();
    $("more").hidden = total <= ROWS;
    set($("all"), view.all ? `Show the first ${ROWS}` : `Show all ${total} threads`);
    const span = r.end - r.start;
    set($("spark-head"), innerWidth <= 640 ? "" : `Last ${duration(Math.round(span / 1000))}`);
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

  function notes() {
    const list = $("notes");
    const last = view.notes.slice(-200).reverse();
    const key = last.length ? `${last.length} ${last[0].key}` : "none";
    if (list.shown === key) return;
    list.shown = key;
    if (!last.length) {
      const item = document.createElement("li");
      item.className = "nothing";
      item.textContent = "None yet. A mark puts a label on the time axis, here and in reports.";
      list.replaceChildren(item);
      return;
    }
    list.replaceChildren(...last.map((note) => {
      const item = document.createElement("li"), time = document.createElement("time"), text = document.createElement("bdi");
      time.dateTime = new Date(note.time).toISOString();
      time.textContent = clock(note.time);
      text.textContent = note.text;
      if (note.kind !== "mark") text.className = `event ${note.kind === "exited" ? "exited" : ""}`;
      item.append(time, text);
      return item;
    }));
  }

  // The cursor

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

  function point() {
    const at = view.hover === null ? view.pin : view.hover;
    $("cursor").hidden = $("reading").hidden = at === null || !shown;
    if (at === null || !shown) return;
    const { r, busiest } = shown;
    const number = nearest(at, r), slot = slotOf(number);
    const width = $("plots").clientWidth;
    const x = LEFT + ((samples.time[slot] - r.start) / (r.end - r.start)) * (width - LEFT);
    $("cursor").style.transform = `translateX(${x}px)`;
    const box = $("reading");
    const lines = [["", clock(samples.time[slot]), ""], ["", "process", `${samples.cpu[slot].toFixed(1)} %`]];
    for (const thread of busiest.filter((each) => each.cpu[slot] >= IDLE).sort((a, b) => b.cpu[slot] - a.cpu[slot]))
      lines.push([String(thread.colour), thread.label, `${thread.cpu[slot].toFixed(1)} %`]);
    lines.push(["", "memory", size(samples.rss[slot])]);
    const near = (r.end - r.start) / 150;
    for (const note of view.notes) if (Math.abs(note.time - samples.time[slot]) < near) lines.push(["", note.text, ""]);
    box.replaceChildren(...lines.map(([colour, name, value]) => {
      const line = document.createElement("p"), swatch = document.createElement("span"), label = document.createElement("bdi"), figure = document.createElement("span");
      swatch.className = "swatch";
      swatch.dataset.colour = colour;
      label.textContent = name;
      figure.textContent = value;
      line.append(swatch, label, figure);
      return line;
    }));
    const right = x + 12 + box.offsetWidth > width;
    box.style.transform = `translateX(${Math.max(0, right ? x - box.offsetWidth - 12 : x + 12)}px)`;
  }

  function timeAt(event) {
    if (!shown) return null;
    const frame = $("plots").getBoundingClientRect();
    const part = (event.clientX - frame.left - LEFT) / (frame.width - LEFT);
    return shown.r.start + Math.min(1, Math.max(0, part)) * (shown.r.end - shown.r.start);
  }

  // What the user does

  function say(text) {
    const toast = $("said");
    toast.textContent = text;
    toast.hidden = false;
    clearTimeout(say.timer);
    say.timer = setTimeout(() => (toast.hidden = true), 4000);
  }

  function choose(window) {
    view.window = window;
    for (const button of document.querySelectorAll("[data-window]"))
      button.setAttribute("aria-pressed", String(Number(button.dataset.window) === window));
    render();
  }

  function hold(paused) {
    if ($("pause").disabled) return;
    view.paused = paused;
    view.end = lastTime();
    $("pause").setAttribute("aria-pressed", String(paused));
    $("pause").textContent = paused ? "Resume" : "Pause";
    if ($("status").dataset.kind === "live") status("live", paused ? "paused" : "live");
    render();
  }

  function pin(time) {
    view.pin = time;
    render();
  }

  for (const button of document.querySelectorAll("[data-window]"))
    button.addEventListener("click", () => {
      view.chosen = true;
      choose(Number(button.dataset.window));
    });
  $("pause").addEventListener("click", () => hold(!view.paused));
  $("curl").addEventListener("click", async () => {
    const path = view.run ? `/runs/${view.run}/history` : view.info && view.info.recorder && view.info.recorder.ended ? "/history?seconds=900" : "/metrics?window_ms=1000&sort=cpu&limit=20";
    const command = `curl -s '${location.origin}${path}'${token ? ' -H "Authorization: Bearer $VITALSD_TOKEN"' : ""}`;
    try {
      await navigator.clipboard.writeText(command);
      say(`Copied: ${command}`);
    } catch {
      say(command);
    }
  });
  $("report").addEventListener("click", async (event) => {
    if (!token) return; // a link cannot send the token
    event.preventDefault();
    const answer = await ask("/report.zip");
    if (!answer.ok) return say(`No report: ${answer.status}`);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(await answer.blob());
    link.download = "report.zip";
    link.click();
    URL.revokeObjectURL(link.href);
  });
  $("token-form").addEventListener("submit", (event) => {
    event.preventDefault();
    token = $("token").value;
    sessionStorage.setItem("vitalsd-token", token);
    $("token-form").hidden = true;
  });
  $("mark-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    const label = $("mark").value.trim() || "mark";
    const answer = await ask("/marks", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ label }) });
    const body = await answer.json();
    if (!answer.ok) return say(body.detail);
    $("mark").value = "";
    annotate({ marks: [body], events: [] });
    render();
  });
  $("filter").addEventListener("input", () => {
    view.filter = $("filter").value;
    render();
  });
  $("all").addEventListener("click", () => {
    view.all = !view.all;
    render();
  });
  for (const head of document.querySelectorAll("th[data-sort]"))
    head.firstElementChild.addEventListener("click", () => {
      view.ascending = view.sort === head.dataset.sort ? !view.ascending : head.dataset.sort === "name" || head.dataset.sort === "tid";
      view.sort = head.dataset.sort;
      for (const other of document.querySelectorAll("th[aria-sort]")) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", view.ascending ? "ascending" : "descending");
      render();
    });
  $("plots").addEventListener("pointermove", (event) => {
    view.hover = timeAt(event);
    point();
  });
  $("plots").addEventListener("pointerleave", () => {
    view.hover = null;
    point();
  });
  $("plots").addEventListener("click", (event) => pin(view.pin === null ? timeAt(event) : null));
  $("plots").addEventListener("keydown", (event) => {
    if (!shown) return;
    const step = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10 }[event.key];
    if (step !== undefined) {
      const from = nearest(view.hover ?? view.pin ?? shown.r.end, shown.r);
      view.hover = samples.time[slotOf(Math.min(shown.r.last - 1, Math.max(shown.r.first, from + step)))];
      event.preventDefault();
      point();
    } else if (event.key === "Enter") {
      pin(view.hover);
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape") {
      view.hover = null;
      pin(null);
      document.activeElement.blur();
    }
    if (/^(INPUT|SELECT|BUTTON|A)$/.test(document.activeElement.tagName)) return;
    if (event.key === " " && document.activeElement === document.body) {
      event.preventDefault();
      hold(!view.paused);
    } else if (event.key === "/") {
      event.preventDefault();
      $("filter").focus();
    } else if (event.key === "m") {
      event.preventDefault();
      $("mark").focus();
    }
  });
  document.addEventListener("visibilitychange", draw);
  addEventListener("scroll", draw, { passive: true });
  addEventListener("resize", draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    theme = null;
    draw();
  });

  live();
  look();
  listRuns();
})();
