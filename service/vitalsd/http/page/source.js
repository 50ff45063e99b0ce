// Fetch the data: first /info and /history, then /stream; when the stream ends, start again.

const HISTORY_THREADS = 64;
const PATIENCE = 20000; // ms; timeout of an answer
const SILENCE = 6000; // ms without an event until the stream, which has one each second, counts as silent
const pause = (ms) => new Promise((done) => setTimeout(done, ms));

// The token comes in the fragment, which no browser sends to a server, and is removed from the address at once.
// A cookie would be sent to every other server on this machine.
let token = sessionStorage.getItem("vitalsd-token");
const given = new URLSearchParams(location.hash.slice(1)).get("token");
if (given) {
  keep(given);
  history.replaceState(null, "", location.pathname + location.search);
}

function keep(value) {
  token = value;
  sessionStorage.setItem("vitalsd-token", token);
}

class Refusal extends Error {}

let skew = 0; // ms; clock of the sidecar minus this one; the page shows times of the sidecar

async function ask(path, options = {}) {
  const tried = token;
  const headers = { ...options.headers };
  if (tried) headers.Authorization = `Bearer ${tried}`;
  const signal = options.signal || AbortSignal.timeout(PATIENCE);
  const answer = await fetch(path, { ...options, headers, signal, cache: "no-store" });
  if (answer.status === 401) {
    await askForToken(tried);
    return ask(path, options);
  }
  const ahead = Date.parse(answer.headers.get("date")) - Date.now();
  skew = Math.abs(ahead) > 2000 ? ahead : 0; // the header has whole seconds, so less is no skew
  return answer;
}

async function askForToken(tried) {
  if (token !== tried) return; // another request has got a token meanwhile
  $("wrong").hidden = !tried;
  $("token-form").hidden = false;
  status("gone", "a token is needed");
  await new Promise((done) => $("token-form").addEventListener("submit", done, { once: true }));
}

async function json(path) {
  const answer = await ask(path);
  const body = await answer.json();
  if (!answer.ok) throw new Refusal(body.detail || body.reason);
  return body;
}

let reading = null; // AbortController of the stream
let heard = null; // time of the last event of the stream, ms; null without a stream
let listed = false; // whether /runs has been requested
let generation = 0; // number of the view; a loop with an older number ends

async function live() {
  const mine = ++generation;
  let wait = 500;
  while (mine === generation) {
    let trouble = "reconnecting";
    if (document.hidden) await visible();
    try {
      const info = await json("/info");
      if (mine !== generation) return;
      identify(info);
      if (!listed) listRuns(); // only after /info, which shows whether this is a replay
      listed = true;
      const past = info.recorder && (await json(`/history?seconds=${reach(info)}&top=${HISTORY_THREADS}&step_ms=${step(info)}`));
      if (mine !== generation) return;
      if (past) ingest(past);
      const over = info.recorder && info.recorder.ended;
      view.over = Boolean(over || info.target.available === false);
      if (over || info.target.available === false) {
        ended(info, over);
        if (isReplay(info)) return;
        await pause(2000);
        continue;
      }
      $("mark").disabled = $("mark-button").disabled = !info.recorder;
      $("pause").disabled = false;
      banner("");
      wait = 500;
      await follow(mine);
    } catch (error) {
      if (error instanceof Refusal) trouble = `${error.message}; trying again`;
      else if (!["TypeError", "AbortError", "TimeoutError"].includes(error.name)) throw error; // not a lost connection but a bug
    }
    if (mine !== generation) return;
    status("wait", trouble);
    await pause(wait);
    wait = Math.min(4000, wait * 1.6);
  }
}

// Wait until the page is visible. A hidden page has no stream: a browser allows six connections to a server, for all its
// tabs. The history fills the gap later.
function visible() {
  status("wait", "in the background");
  return new Promise((done) => {
    document.addEventListener("visibilitychange", function look() {
      if (document.hidden) return;
      document.removeEventListener("visibilitychange", look);
      done();
    });
  });
}

let hiding = 0;
document.addEventListener("visibilitychange", () => {
  clearTimeout(hiding);
  if (document.hidden) hiding = setTimeout(() => reading && reading.abort(), 20000);
});

const isReplay = (info) => Boolean(info.replay);

function ended(info, over) {
  const replay = isReplay(info);
  status(replay ? "past" : "gone", replay ? "replay" : over ? "target has ended" : "no target");
  banner(replay ? outcome(info.replay.run) : over || info.target.reason);
  if (replay) {
    if (!view.chosen) choose(0);
    card(info.replay);
    $("report").hidden = !info.replay.report;
    $("run-first").textContent = runName(info.replay.run);
  }
  $("mark").disabled = $("mark-button").disabled = $("pause").disabled = true;
  draw();
}

// Return the length of the history, s.
function reach(info) {
  return isReplay(info) ? 86400 : Math.max(900, info.recorder ? info.recorder.retention_secs : 0);
}

// Return the time between two samples, ms, with which CAPACITY samples cover the history.
function spacing(info) {
  if (isReplay(info)) return Math.floor((info.recorder.snapshots * info.recorder.interval_ms) / CAPACITY);
  return Math.ceil((reach(info) * 1000) / CAPACITY);
}

// Return the step of the history, ms: just under 1 s, so that it does not merge two snapshots that are 1 s apart.
function step(info) {
  return isReplay(info) ? spacing(info) : Math.max(950, spacing(info));
}

async function follow(mine) {
  reading = new AbortController();
  view.before = view.latest = null;
  const answer = await ask(`/stream?interval_ms=1000&detail=full${view.family ? "&children=true" : ""}`, { signal: reading.signal });
  if (!answer.ok) throw new Refusal((await answer.json()).detail);
  heard = performance.now();
  status("live", view.paused ? "paused" : "live");
  const lines = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { value, done } = await lines.read();
      if (done || mine !== generation) return;
      heard = performance.now();
      status("live", view.paused ? "paused" : "live");
      text += value;
      let end;
      while ((end = text.indexOf("\n\n")) >= 0) {
        const event = text.slice(0, end);
        text = text.slice(end + 2);
        const at = event.indexOf("data: ");
        if (at >= 0) take(JSON.parse(event.slice(at + 6)));
      }
    }
  } finally {
    heard = null;
  }
}

function take(answer) {
  if (answer.available === false) return;
  const { process } = answer;
  // Downsample a long recording: replace the newest sample until it is far enough from the one before.
  if (samples.n > 1 && Date.now() + skew - samples.time[slotOf(samples.n - 2)] < spacing(view.info)) samples.n -= 1;
  else view.before = view.latest;
  const reason = (name) => (REASONS[name] ?? TEXTS[name])[1](answer, view.before);
  add(Date.now() + skew, process.cpu_percent, process.rss_kb, process.thread_count, reason, (put) => {
    for (const thread of answer.threads) put(thread.tid, thread.name, thread.cpu_percent, thread.wait_percent);
  }, (put) => {
    for (const child of answer.children ?? []) put(child.pid, child.name, child.cpu_percent, child.rss_kb);
  });
  view.latest = answer;
  view.uptime = process.uptime_secs;
  draw();
}

// Detect a sidecar that hangs: its connections stay open.
setInterval(() => {
  if (heard === null) return;
  const silence = performance.now() - heard;
  if (silence > SILENCE) status("wait", `no data for ${duration(silence / 1000)}`);
  if (silence > 4 * SILENCE) reading.abort();
}, 1000);

// Poll what the stream does not contain: marks, events, and the cost of the sidecar.
async function look() {
  for (;;) {
    await pause(2000);
    if (heard === null || view.run || document.hidden) continue;
    try {
      const mine = generation;
      const info = await json("/info");
      if (mine !== generation) continue;
      if (info.recorder) {
        const table = await json(`/history?seconds=30&top=0&step_ms=${step(info)}`);
        if (mine !== generation) continue;
        gaugesOf(table);
        annotate(table);
      }
      own(info);
    } catch {
      // the stream fails too, and live() shows the error
    }
  }
}

function identify(info) {
  const id = info.target.start_id;
  if (id && view.startId && id !== view.startId) resetSamples();
  if (id) view.startId = id;
  view.info = info;
  view.uptime = isReplay(info) || !id ? null : (Date.now() + skew - Date.parse(info.target.started_at)) / 1000;
  show(info.target, info.platform);
  own(info);
}

async function listRuns() {
  let runs = [];
  try {
    runs = await json("/runs");
  } catch {
    return; // live() shows the error
  }
  const replayed = view.info && isReplay(view.info);
  runs = runs.filter((run) => (replayed || run.state !== "running") && run.snapshots > 1).slice(0, 30);
  if (!runs.length) return;
  $("run").append(...runs.map((run) => {
    const option = document.createElement("option");
    option.value = run.id;
    option.textContent = runName(run);
    return option;
  }));
  $("run-label").hidden = false;
  $("run").addEventListener("change", () => openRun($("run").value, runs));
}

function runName(run) {
  const state = { crashed: "crashed", running: "running when reported", clean: "ended" }[run.state];
  return `${state} \u00b7 ${clean(run.app || run.name)} \u00b7 ${new Date(run.recorded_to).toLocaleString()}`;
}

async function openRun(id, runs) {
  const mine = ++generation;
  view.run = id;
  if (reading) reading.abort();
  if (view.paused) hold(false);
  resetSamples();
  view.startId = "";
  if (!id) {
    live();
    return;
  }
  const run = runs.find((each) => each.id === id);
  const span = Date.parse(run.recorded_to) - Date.parse(run.recorded_from);
  try {
    const table = await json(`/runs/${encodeURIComponent(id)}/history?seconds=86400&top=${HISTORY_THREADS}&step_ms=${Math.floor(span / CAPACITY)}`);
    if (mine !== generation) return;
    ingest(table);
    show(table.target, table.platform);
  } catch (error) {
    if (mine === generation) status("gone", error.message);
    return;
  }
  status("past", view.info && isReplay(view.info) ? "replay" : "earlier run");
  banner(outcome(run));
  view.over = true;
  $("mark").disabled = $("mark-button").disabled = $("pause").disabled = true;
  choose(0);
}
