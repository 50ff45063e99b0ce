// Show everything besides plots and table, and handle the input of the user.

function status(kind, text) {
  const element = $("status");
  if (element.dataset.kind !== kind) element.dataset.kind = kind;
  if (element.textContent !== text) element.textContent = text;
}

function banner(text) {
  $("banner").hidden = !text;
  $("banner").textContent = clean(text);
}

// Return a time in the time zone of the browser, and in UTC: a report may come from another time zone.
function moment(text) {
  const time = new Date(text);
  if (!text || Number.isNaN(time.getTime())) return "";
  return `${time.toLocaleString([], { dateStyle: "medium", timeStyle: "medium" })} (${time.toISOString().slice(0, 19)}Z)`;
}

function utcOffset(minutes) {
  const sign = minutes < 0 ? "\u2212" : "+", value = Math.abs(minutes), two = (number) => String(number).padStart(2, "0");
  return `UTC${sign}${two(Math.floor(value / 60))}:${two(value % 60)}`;
}

function systemOf(host, platform) {
  const system = platform === "macos" && host.version ? `macOS ${host.version}` : [host.system, host.release].filter(Boolean).join(" ");
  return [system, host.arch, host.cpu_count && `${host.cpu_count} CPUs`].filter(Boolean).join(", ");
}

// Return the numbers of the window that was measured at the request for the report.
function atRequest({ process, threads, sample_window_ms }) {
  return `CPU ${process.cpu_percent.toFixed(1)} %, ${size(process.rss_kb)}, ${threads} threads, over ${(sample_window_ms / 1000).toFixed(1)} s`;
}

// Show the card of a replayed report: its description and facts.
function card(replay) {
  const { report, run } = replay;
  $("card").hidden = false;
  $("card-title").textContent = `Replay of ${clean(replay.file)}`;
  $("card-text").textContent = cleanLines(report && report.description ? report.description : "");
  const host = run.host.system ? run.host : report ? report.host : run.host;
  const app = report && report.app ? [report.app, report.app_version] : [run.app, run.app_version];
  const facts = [
    ["Application", app.filter(Boolean).map(clean).join(" ")],
    ["System", clean(systemOf(host, run.platform))],
    ["Time zone", host.utc_offset_minutes === null ? "" : utcOffset(host.utc_offset_minutes)],
    ["Requested", report ? moment(report.triggered_at) : ""],
    ["At the request", report && report.metrics ? atRequest(report.metrics) : ""],
    ["Contains", report ? report.members.map((each) => `${clean(each.name)} (${fileSize(each.size)})`).join(", ") : ""],
    ...(report ? report.failures : []).map((each) => ["Missing", `${clean(each.member)}: ${clean(each.reason)}`]),
  ];
  $("card-facts").replaceChildren(...facts.filter(([, value]) => value).flatMap(([name, value]) => {
    const term = document.createElement("dt"), text = document.createElement("dd");
    term.textContent = name;
    text.textContent = value;
    return [term, text];
  }));
}

// Return text of several lines, each of them cleaned.
function cleanLines(text) {
  return text.split("\n").map(clean).join("\n");
}

// Return how a run ended, as text for the banner.
function outcome(run) {
  const app = run.app ? [run.app, run.app_version].filter(Boolean).join(" ") : run.name;
  const how = { crashed: "crashed", running: "was running when the report was made", clean: "ended" }[run.state];
  const last = run.recorded_to ? ` Last recorded at ${moment(run.recorded_to)}.` : "";
  const ended = (run.ended || "").replace(`target ${run.pid} has exited: `, "");
  return `${app} ${how}${ended ? `: ${ended}` : ""}.${last}`;
}

function show(target, platform) {
  view.platform = platform;
  const name = target.name ? clean(target.name) : "no target";
  $("name").textContent = name;
  document.title = `${name} \u2013 vitalsd`;
  $("target").textContent = target.pid ? `pid ${target.pid} \u00b7 ${platform} \u00b7 since ${new Date(target.started_at).toLocaleString([], { dateStyle: "medium", timeStyle: "medium" })}` : "";
}

let cost = null; // cost of the sidecar in the last /info
function own(info) {
  const now = performance.now();
  let uses = "";
  if (cost && cost.pid === info.self.pid && now > cost.at)
    uses = ` \u00b7 ${((100000 * (info.self.cpu_secs - cost.cpu)) / (now - cost.at)).toFixed(1)} % CPU`;
  cost = { pid: info.self.pid, cpu: info.self.cpu_secs, at: now };
  const recorder = info.recorder && info.recorder.retention_secs
    ? ` \u00b7 records every ${info.recorder.interval_ms} ms, keeps ${Math.round(info.recorder.retention_secs / 60)} min` : "";
  $("own").textContent = `vitalsd ${info.version}${uses}, peak ${size(info.self.peak_rss_kb)}${recorder}`;
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

const fileSize = (bytes) => (bytes < 10240 ? `${bytes} bytes` : size(bytes / 1024));

function duration(seconds) {
  const s = Math.floor(seconds);
  if (s < 60) return `${s} s`;
  if (s < 3600) return two(s, 60, "min", 1, "s");
  if (s < 86400) return two(s, 3600, "h", 60, "min");
  return two(s, 86400, "d", 3600, "h");
}

function two(s, large, unit, small, rest) {
  const left = Math.floor((s % large) / small);
  return `${Math.floor(s / large)} ${unit}${left ? ` ${left} ${rest}` : ""}`;
}

const clocks = new Map(); // second -> text; a cache, because formatting a time costs more than drawing it
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

let scheduled = false;
function draw() {
  if (scheduled || document.hidden) return;
  scheduled = true;
  requestAnimationFrame(() => {
    scheduled = false;
    render();
  });
}

let shown = null; // the range of the last rendering, and the numbers computed for it

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
  plotGauges(r, focus);
  reasons(r, focus);
  table(r, focus);
  notes();
  point();
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
  set($("cpu-note"), view.info && !view.run && !isReplay(view.info) ? `of ${100 * view.info.cpu_count} %` : "");
  set($("rss"), size(samples.rss[slot]));
  set($("rss-note"), `${size(low)} to ${size(high)}`);
  set($("count"), String(samples.count[slot]));
  set($("count-note"), `${busy} active`);
  set($("up"), view.uptime === null ? "Recorded" : "Up");
  set($("uptime"), duration(view.uptime === null ? (lastTime() - samples.time[slotOf(oldest())]) / 1000 : view.uptime));
  set($("at"), view.pin === null ? "" : `at ${clock(samples.time[slot])}`);
}

function notes() {
  const list = $("notes");
  const last = view.notes.slice(-200).reverse();
  const key = last.length ? last.map((note) => `${note.time} ${note.kind} ${inWords(note)}`).join("\n") : "none";
  if (list.shown === key) return;
  list.shown = key;
  if (!last.length) {
    const item = document.createElement("li");
    item.className = "nothing";
    item.textContent = "None yet. A mark labels a time, here and in reports.";
    list.replaceChildren(item);
    return;
  }
  list.replaceChildren(...last.map((note) => {
    const item = document.createElement("li"), time = document.createElement("time"), text = document.createElement("bdi");
    time.dateTime = new Date(note.time).toISOString();
    time.textContent = clock(note.time);
    text.textContent = inWords(note);
    if (note.kind !== "mark") text.className = `event ${note.kind === "exited" || goesOn(note) ? "exited" : ""}`;
    item.append(time, text);
    return item;
  }));
}

// The cursor

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
  if (!Number.isNaN(samples.wait[slot])) lines.push(["", "waiting for a CPU", measured(samples.wait[slot])]);
  const near = (r.end - r.start) / 150;
  const time = samples.time[slot];
  for (const note of view.notes) if (note.time - near < time && time < lasts(note) + near) lines.push([null, inWords(note), ""]);
  box.replaceChildren(...lines.map(([colour, name, value]) => {
    const line = document.createElement("p"), swatch = document.createElement("span"), label = document.createElement("bdi"), figure = document.createElement("span");
    swatch.className = "swatch";
    swatch.dataset.colour = colour ?? "";
    line.className = colour === null ? "note" : "";
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

// Input of the user

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
function curlCommand() {
  const over = view.info && view.info.recorder && view.info.recorder.ended;
  const path = view.run ? `/runs/${encodeURIComponent(view.run)}/history` : over ? `/history?seconds=${reach(view.info)}` : "/metrics?window_ms=1000&sort=cpu&limit=20";
  const command = `curl -s '${`${location.origin}${path}`.replaceAll("'", "%27")}'`;
  // The token goes to standard input: every user of the machine can read a command line.
  return token ? `printf 'Authorization: Bearer %s' "$VITALSD_TOKEN" | ${command} -H @-` : command;
}
$("curl").addEventListener("click", async () => {
  const command = curlCommand();
  try {
    await navigator.clipboard.writeText(command);
    say(`Copied: ${command}`);
  } catch {
    say(command);
  }
});
$("report").addEventListener("click", async () => {
  const replayed = view.info && isReplay(view.info);
  const path = view.run && !replayed ? `/report.zip?run=${encodeURIComponent(view.run)}` : "/report.zip";
  const made = { method: "POST", headers: { "Content-Type": "application/json" }, body: "{}" };
  let answer;
  try {
    answer = await ask(path, replayed ? {} : made);
  } catch {
    return say("No report: the sidecar does not answer.");
  }
  if (!answer.ok) return say(`No report: ${(await answer.json()).detail}`);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await answer.blob());
  link.download = /filename="([^"]+)"/.exec(answer.headers.get("content-disposition"))[1];
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
});
$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  keep($("token").value.trim());
  $("token").value = "";
  $("token-form").hidden = true;
});
$("mark-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const label = $("mark").value.trim() || "mark";
  let answer, body;
  try {
    answer = await ask("/marks", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ label }) });
    body = await answer.json();
  } catch {
    return say("No mark: the sidecar does not answer.");
  }
  if (!answer.ok) return say(body.detail);
  $("mark").value = "";
  annotate({ marks: [body], events: [] });
  render();
});
$("reasons").addEventListener("toggle", draw);
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
listenForBeats();
