// Settings, kept in this browser. The API key stays in this tab unless its owner says otherwise.

const PLACE = "ggmq.settings";
const KEY = "ggmq.key";

const DEFAULTS = {
  system: "",
  temperature: null,
  top_p: null,
  max_tokens: null,
  reasoning: true,
  theme: "auto",
  model: "",
  keepKey: false,
};
const RANGES = { temperature: [0, 5], top_p: [0, 1], max_tokens: [1, 10_000_000] };

function read(store, name) {
  try {
    return store.getItem(name);
  } catch {
    return null; // the browser keeps nothing for this page
  }
}

function write(store, name, value) {
  try {
    if (value) store.setItem(name, value);
    else store.removeItem(name);
  } catch {
    // it keeps nothing: the settings last as long as the page
  }
}

/** A number within its range, or null for what the server does by itself. */
export function inRange(name, value) {
  if (value === null || value === "" || value === undefined) return null;
  const [low, high] = RANGES[name];
  const n = Number(value);
  if (!Number.isFinite(n)) return null;
  const held = Math.min(high, Math.max(low, n));
  return name === "max_tokens" ? Math.round(held) : held;
}

function valid(found) {
  const known = { ...DEFAULTS };
  for (const name of Object.keys(RANGES)) known[name] = inRange(name, found[name]);
  for (const name of ["system", "model"]) if (typeof found[name] === "string") known[name] = found[name];
  for (const name of ["reasoning", "keepKey"]) if (typeof found[name] === "boolean") known[name] = found[name];
  if (["auto", "light", "dark"].includes(found.theme)) known.theme = found.theme;
  return known;
}

function load() {
  let found = null;
  try {
    found = JSON.parse(read(localStorage, PLACE) ?? "null");
  } catch {
    // not ours: the defaults hold
  }
  const held = valid(found !== null && typeof found === "object" ? found : {});
  return { ...held, key: read(sessionStorage, KEY) || read(localStorage, KEY) || "" };
}

export const settings = load();

export function change(changes) {
  Object.assign(settings, valid({ ...settings, ...changes }));
  if (typeof changes.key === "string") settings.key = changes.key.trim();
  const { key, ...rest } = settings;
  write(localStorage, PLACE, JSON.stringify(rest));
  write(sessionStorage, KEY, key);
  write(localStorage, KEY, settings.keepKey ? key : "");
  showTheme();
}

/** Light or dark: what the system says, unless the switch says otherwise. */
export function showTheme() {
  const root = document.documentElement;
  if (settings.theme === "auto") delete root.dataset.theme;
  else root.dataset.theme = settings.theme;
}

export const isDark = () =>
  settings.theme === "dark" || (settings.theme === "auto" && matchMedia("(prefers-color-scheme: dark)").matches);
