// What the cluster does, as the server tells it twice a second. A worker that is gone from the story is still shown, as lost.

import { ApiError, ask, eventsOf } from "./api.js";

const SILENT_MS = 6000; // without an event: the connection counts as broken
const REMEMBERED_MS = 600_000;
const RETRY_MS = [500, 1000, 2000, 3000, 5000];

export const feed = {
  snapshot: null,
  connected: false,
  problem: null, // an ApiError while it is not connected
  lostAt: 0,
  retryAt: 0,
};

const listeners = new Set();
const seen = new Map(); // worker name → {host, worker, at}
let abort = null;
let timer = 0;
let n_tries = 0;

export function onFeed(listener) {
  listeners.add(listener);
}

const tell = () => listeners.forEach((listener) => listener(feed));

function complete(raw) {
  const snapshot = {
    models: [],
    hosts: [],
    slots: [],
    uptime_s: 0,
    error: "",
    ...raw,
    tokens_per_s: { prompt: 0, decode: 0, ...raw.tokens_per_s },
    queue: { waiting: 0, limit: 0, ...raw.queue },
  };
  const now = Date.now();
  const here = new Set();
  for (const host of snapshot.hosts) {
    for (const worker of host.workers) {
      here.add(worker.name);
      // a lost worker tells nothing: what it had is what it was last known to have
      const known = seen.get(worker.name)?.worker.devices ?? [];
      if (worker.state !== "ready" && !worker.devices?.length) worker.devices = known;
      for (const device of worker.devices) {
        const before = known.find((other) => other.name === device.name);
        if (before && !device.total_bytes) Object.assign(device, { ...before, index: device.index, layers: device.layers });
      }
      if (worker.devices?.length) seen.set(worker.name, { host: host.name, worker, at: now });
    }
  }
  for (const [name, { host, worker, at }] of seen) {
    if (here.has(name)) continue;
    if (now - at > REMEMBERED_MS) {
      seen.delete(name);
      continue;
    }
    let home = snapshot.hosts.find((other) => other.name === host);
    if (!home) snapshot.hosts.push((home = { name: host, workers: [] }));
    home.workers.push({ ...worker, state: "lost" });
  }
  return snapshot;
}

async function listen() {
  abort?.abort();
  const mine = (abort = new AbortController());
  const { signal } = mine;
  let watchdog = 0;
  const alive = () => {
    clearTimeout(watchdog);
    watchdog = setTimeout(() => mine.abort(), SILENT_MS);
  };
  let problem = new ApiError(0, "the server ended the connection");
  try {
    alive();
    for await (const data of eventsOf(await ask("cluster/events", { signal }))) {
      alive();
      feed.snapshot = complete(JSON.parse(data));
      feed.connected = true;
      feed.problem = null;
      n_tries = 0;
      tell();
    }
  } catch (error) {
    problem = error instanceof ApiError ? error : new ApiError(0, "the server does not answer");
  } finally {
    clearTimeout(watchdog);
  }
  if (document.hidden || abort !== mine) return;
  if (feed.connected || !feed.lostAt) feed.lostAt = Date.now();
  feed.connected = false;
  feed.problem = problem;
  const wait = RETRY_MS[Math.min(n_tries++, RETRY_MS.length - 1)];
  feed.retryAt = Date.now() + wait;
  timer = setTimeout(listen, wait);
  tell();
}

/** Connect at once: at the start, with a new key, or when somebody asks. */
export function reconnect() {
  clearTimeout(timer);
  n_tries = 0;
  listen();
}

document.addEventListener("visibilitychange", () => {
  clearTimeout(timer);
  if (document.hidden)
    abort?.abort(); // nobody looks: nothing is sent
  else listen();
});

/** Devices in the order in which they were first seen; each keeps its colour. */
const colours = new Map();

export function colourOf(worker, device) {
  const name = `${worker.name}/${device.index}`;
  if (!colours.has(name)) colours.set(name, colours.size % 8);
  return colours.get(name);
}

export function* devicesOf(snapshot) {
  for (const host of snapshot?.hosts ?? []) {
    for (const worker of host.workers) for (const device of worker.devices ?? []) yield { host, worker, device };
  }
}

/** Where a model's layers are: `{first, last, worker, device, host, held}` in order; a part that nobody has has no device. */
export function placesOf(snapshot, model) {
  const found = [];
  for (const { host, worker, device } of devicesOf(snapshot)) {
    for (const held of device.layers ?? []) {
      if (held.model === model.name && held.last >= held.first)
        found.push({ first: held.first, last: held.last, host, worker, device, held });
    }
  }
  // when layers have moved, whoever is ready has them
  const alive = found.filter((place) => place.worker.state !== "lost");
  const rest = found.filter(
    (place) =>
      place.worker.state === "lost" && !alive.some((other) => other.first <= place.last && place.first <= other.last),
  );
  const places = [];
  let next = 0;
  for (const place of [...alive, ...rest].sort((a, b) => a.first - b.first)) {
    if (place.first > next) places.push({ first: next, last: place.first - 1 });
    places.push(place);
    next = Math.max(next, place.last + 1);
  }
  if (next < model.n_layers) places.push({ first: next, last: model.n_layers - 1 });
  return places;
}

export const lostWorkers = (snapshot) =>
  (snapshot?.hosts ?? []).flatMap((host) => host.workers.filter((w) => w.state === "lost"));
