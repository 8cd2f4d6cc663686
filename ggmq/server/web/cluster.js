// The cluster, live: models over devices, hosts, workers, memory, links, slots.

import { $, announce, h, icon } from "./dom.js";
import { colourOf, feed, onFeed, placesOf } from "./feed.js";
import { strip, stripKey } from "./strip.js";
import { bytes, count, duration, layers, many, plural, rate } from "./words.js";

const KEPT = 120; // rates for the curve: a minute
const view = $("#cluster");
const numbers = $("#numbers");
const models = $("#models");
const hosts = $("#hosts");
const slots = $("#slots");

const rates = [];
const STATES = { ready: "ready", silent: "silent", lost: "lost" };
let told = null; // states of workers that were announced

function curve() {
  const most = Math.max(1, ...rates);
  const points = rates.map((r, i) => `${((i + KEPT - rates.length) * 100) / (KEPT - 1)},${24 - (22 * r) / most}`);
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
  svg.setAttribute("viewBox", "0 0 100 25");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  svg.classList.add("curve");
  line.setAttribute("points", points.join(" "));
  svg.append(line);
  return svg;
}

function number(label, value, unit, more) {
  return h(
    "div",
    { class: "number" },
    h("dt", {}, label),
    h("dd", {}, h("b", {}, value), unit && h("span", {}, ` ${unit}`), more),
  );
}

function showNumbers(s) {
  const busy = s.slots.filter((slot) => slot.state !== "idle").length;
  numbers.replaceChildren(
    number("Decode", rate(s.tokens_per_s.decode), "tokens/s", curve()),
    number("Prompt", rate(s.tokens_per_s.prompt), "tokens/s"),
    number("Slots busy", `${busy}`, `of ${s.slots.length}`),
    number("Queue", count(s.queue.waiting), s.queue.limit ? `of ${count(s.queue.limit)}` : "waiting"),
    number("Up for", duration(Math.max(1, Math.round(s.uptime_s))).replace(".0 s", " s"), ""),
  );
}

/** Draw a part again only when what it shows has changed: what has the focus, or is selected, stays. */
function draw(place, key, make) {
  if (place.dataset.key === key) return;
  place.dataset.key = key;
  place.replaceChildren(...make());
}

function modelCard(s, model) {
  const facts = [
    `${plural(model.n_layers, "layer")}`,
    model.n_params && `${many(model.n_params)} weights`,
    model.bytes && bytes(model.bytes),
    model.n_ctx && `context ${count(model.n_ctx)}`,
  ];
  const missing = placesOf(s, model).filter((place) => !place.device || place.worker.state === "lost");
  return h(
    "section",
    { class: "card model" },
    h("h3", {}, model.name),
    h("p", { class: "quiet" }, facts.filter(Boolean).join(" · ")),
    strip(s, model, { labels: true }),
    missing.length > 0 &&
      h(
        "p",
        { class: "bad" },
        icon("warn"),
        `Without a live worker: ${missing.map((p) => layers(p.first, p.last)).join(", ")}`,
      ),
  );
}

function memory(device) {
  const { total_bytes: total = 0, free_bytes: free = 0, buffer_bytes: ours = 0 } = device;
  if (!total) return h("p", { class: "quiet" }, "Memory unknown");
  const used = Math.max(0, total - free);
  const mine = Math.min(ours, total);
  const others = Math.max(0, used - mine);
  const words = `${bytes(mine)} of buffers, ${bytes(others)} of others, ${bytes(free)} free of ${bytes(total)}`;
  return h(
    "div",
    { class: "memory" },
    h(
      "div",
      { class: "memory-bar", role: "img", "aria-label": `Memory: ${words}`, title: words },
      h("span", { class: "ours", vars: { "--part": mine / total } }),
      h("span", { class: "others", vars: { "--part": others / total } }),
    ),
    h(
      "div",
      { class: "memory-words" },
      h("span", {}, `${bytes(mine)} ours`),
      h("span", {}, `${bytes(free)} free of ${bytes(total)}`),
    ),
  );
}

function heldWords(held) {
  const parts = [layers(held.first, held.last)];
  if (held.last < held.first) parts.pop();
  if (held.embedding) parts.unshift("embedding");
  if (held.output) parts.push("output");
  const sizes = [
    held.weight_bytes && `${bytes(held.weight_bytes)} weights`,
    held.kv_bytes && `${bytes(held.kv_bytes)} KV cache`,
  ].filter(Boolean);
  return h(
    "li",
    {},
    h("span", {}, `${held.model}: ${parts.join(" + ")}`),
    sizes.length > 0 && h("span", { class: "quiet" }, sizes.join(", ")),
  );
}

function deviceBlock(worker, device) {
  return h(
    "div",
    { class: `device dev-${colourOf(worker, device)}` },
    h(
      "h5",
      {},
      h("i", { class: "swatch", "aria-hidden": "true" }),
      device.name,
      h("small", {}, device.description || device.kind),
    ),
    memory(device),
    device.layers?.length
      ? h("ul", { class: "held" }, device.layers.map(heldWords))
      : h("p", { class: "quiet" }, "No layers"),
  );
}

function workerBlock(worker) {
  const state = STATES[worker.state] ?? worker.state;
  const ping = worker.ping_ms;
  return h(
    "section",
    { class: `worker is-${worker.state}`, data: { worker: worker.name, state: worker.state } },
    h(
      "header",
      {},
      h("h4", {}, worker.name),
      h("span", { class: "state" }, worker.state === "ready" ? null : icon("warn"), state),
      h(
        "span",
        { class: "link" },
        worker.address,
        worker.state === "ready" &&
          typeof ping === "number" &&
          h("b", { title: "Time of a message there and back" }, `${ping < 10 ? ping.toFixed(1) : Math.round(ping)} ms`),
      ),
    ),
    (worker.devices ?? []).map((device) => deviceBlock(worker, device)),
  );
}

function hostCard(host) {
  const lost = host.workers.filter((w) => w.state === "lost").length;
  const words = [plural(host.workers.length, "worker")];
  if (lost) words.push(`${lost} lost`);
  return h(
    "section",
    { class: `card host${host.workers.length > 1 ? " is-wide" : ""}` },
    h("h3", {}, host.name, h("small", { class: lost ? "bad" : "" }, words.join(", "))),
    host.workers.map(workerBlock),
  );
}

function slotRow(slot, isNamed) {
  const words = {
    idle: "idle",
    prompt: `reading ${count(slot.n_read)} of ${count(slot.n_prompt)}`,
    decode: `writing, ${plural(slot.n_made ?? 0, "token")}`,
  };
  const used = slot.state === "idle" ? 0 : (slot.n_read ?? 0) + (slot.n_made ?? 0);
  const part = slot.state === "prompt" ? slot.n_read / Math.max(1, slot.n_prompt) : used / Math.max(1, slot.n_ctx);
  const seconds = slot.state !== "idle" && slot.seconds ? duration(slot.seconds) : "";
  return h(
    "tr",
    { class: `slot is-${slot.state}` },
    h("th", { scope: "row" }, slot.id, isNamed && h("small", {}, slot.model)),
    h("td", {}, words[slot.state] ?? slot.state),
    h(
      "td",
      { class: "wide" },
      h("div", { class: "progress", "aria-hidden": "true" }, h("span", { vars: { "--part": Math.min(1, part || 0) } })),
    ),
    h("td", { class: "right" }, slot.state === "idle" ? "" : `${count(used)} of ${count(slot.n_ctx)}`),
    h("td", { class: "right time" }, slot.spec_accepted ? `${Math.round(slot.spec_accepted * 100)} % drafts` : "", seconds),
  );
}

function showSlots(s) {
  slots.replaceChildren(
    h(
      "table",
      {},
      h("caption", { class: "off-screen" }, "Slots"),
      h(
        "thead",
        {},
        h(
          "tr",
          {},
          ["Slot", "Does", "", "Context", "Time"].map((word, i) =>
            word
              ? h("th", { scope: "col", class: ["", "", "wide", "right", "right time"][i] }, word)
              : h("td", { class: "wide" }),
          ),
        ),
      ),
      h(
        "tbody",
        {},
        s.slots.map((slot) => slotRow(slot, s.models.length > 1)),
      ),
    ),
  );
}

function tellStates(s) {
  const states = new Map(s.hosts.flatMap((host) => host.workers.map((worker) => [worker.name, worker.state])));
  if (told) {
    for (const [name, state] of states)
      if (told.has(name) && told.get(name) !== state) announce(`Worker ${name}: ${STATES[state] ?? state}`);
  }
  told = states;
}

// What moves at each event (free bytes by a little, a ping) is rounded before it counts as a change.
const roughly = (key, value) =>
  key === "ping_ms" ? Math.round(value * 10) : key.endsWith("_bytes") ? bytes(value) : key === "n_computes" ? 0 : value;

export function showCluster() {
  const s = feed.snapshot;
  view.classList.toggle("is-stale", Boolean(s) && !feed.connected);
  $("#as-of").textContent = s && !feed.connected ? `as it was at ${new Date(feed.lostAt).toLocaleTimeString()}` : "";
  $("#cluster-none").hidden = Boolean(s);
  $("#cluster-known").hidden = !s;
  if (!s || view.hidden) return;
  showNumbers(s);
  draw(models, s.models.map((model) => JSON.stringify(model) + stripKey(s, model)).join(), () =>
    s.models.map((model) => modelCard(s, model)),
  );
  draw(hosts, JSON.stringify(s.hosts, roughly), () => s.hosts.map(hostCard));
  showSlots(s);
}

onFeed(({ snapshot, connected }) => {
  if (snapshot && connected) {
    rates.push(snapshot.tokens_per_s.decode);
    if (rates.length > KEPT) rates.shift();
    tellStates(snapshot);
  }
  showCluster();
});
