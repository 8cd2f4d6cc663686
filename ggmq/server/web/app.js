// The page: what the server is, which view is shown, and keys for everything.

import { running } from "./answer.js";
import { askJson } from "./api.js";
import * as chat from "./chat.js";
import { showCluster } from "./cluster.js";
import * as dialogs from "./dialogs.js";
import { $, announce, h, icon } from "./dom.js";
import { feed, lostWorkers, onFeed, placesOf, reconnect } from "./feed.js";
import { change, isDark, settings, showTheme } from "./settings.js";
import * as sidebar from "./sidebar.js";
import * as store from "./store.js";
import { strip, stripKey } from "./strip.js";
import { plural } from "./words.js";

const server = {
  names: [],
  props: null,
  model() {
    return this.names.includes(settings.model) ? settings.model : this.names[0];
  },
  contextSize() {
    const known = feed.snapshot?.models.find((model) => model.name === this.model());
    return known?.n_ctx || this.props?.default_generation_settings?.n_ctx || 0;
  },
};

// ---- what the server is

const select = $("#model");

async function learn() {
  const [names, props] = await Promise.allSettled([askJson("v1/models"), askJson("props")]);
  if (names.status === "fulfilled") server.names = (names.value.data ?? []).map((model) => model.id);
  if (props.status === "fulfilled") server.props = props.value;
  dialogs.showDefaults(server.props);
  showModels();
  showTop();
  chat.refresh();
}

function showModels() {
  const { names } = server;
  select.replaceChildren(...names.map((name) => h("option", { value: name }, name)));
  if (names.length) select.value = server.model();
  select.hidden = names.length < 2;
  $("#model-name").hidden = names.length > 1;
  $("#model-name").textContent = server.model() ?? "No model";
}

select.addEventListener("change", () => {
  change({ model: select.value });
  showTop();
  chat.refresh();
});

let topKey = "";

function showTop() {
  const { snapshot } = feed;
  const model = snapshot?.models.find((one) => one.name === server.model());
  const key = model ? stripKey(snapshot, model) : "";
  if (key === topKey) return;
  topKey = key;
  $("#top-strip").replaceChildren(...(model ? [strip(snapshot, model)] : []));
}

let bannerKey = "";
let bannerText = "";
let dismissed = ""; // names of lost workers of which somebody has taken note

function showBanner() {
  const place = $("#banner");
  const lost = lostWorkers(feed.snapshot);
  let text = "";
  let act = null;
  let isMild = false;
  if (!feed.connected && feed.problem) {
    if (feed.problem.status === 401) text = "The server asks for a key.";
    else if (feed.problem.status) text = `The server tells nothing of the cluster: ${feed.problem.message}.`;
    else text = `No connection to the server since ${new Date(feed.lostAt).toLocaleTimeString()}. Trying again.`;
    act = feed.problem.status === 401 ? ["Enter the key", () => dialogs.openSettings("key")] : ["Try now", reconnect];
  } else if (feed.snapshot?.error) text = feed.snapshot.error;
  else if (lost.length) {
    const names = lost.map((worker) => worker.name).join(", ");
    isMild = feed.snapshot.models.every((model) =>
      placesOf(feed.snapshot, model).every((place) => place.device && place.worker.state !== "lost"),
    );
    text = `${plural(lost.length, "worker")} lost: ${names}.${isMild ? " The others have all layers now." : ""}`;
    if (isMild && dismissed === names) text = "";
    else if (isMild)
      act = [
        "Dismiss",
        () => {
          dismissed = names;
          showBanner();
        },
      ];
    else if ($("#cluster").hidden) act = ["See the cluster", () => (location.hash = "#/cluster")];
  }
  if (!lost.length) dismissed = "";
  const key = `${text} ${act?.[0]}`;
  if (key === bannerKey) return;
  bannerKey = key;
  place.hidden = !text;
  place.classList.toggle("is-mild", isMild);
  place.replaceChildren(
    ...(text
      ? [
          icon("warn"),
          h("span", {}, text),
          act && h("button", { type: "button", class: "button", onclick: act[1] }, act[0]),
        ].filter(Boolean)
      : []),
  );
  if (text && text !== bannerText) announce(text);
  bannerText = text;
}

let wasConnected = false;

onFeed(({ connected }) => {
  if (connected && !wasConnected) {
    if (feed.lostAt) learn();
    chat.forget([0, 401]);
  }
  wasConnected = connected;
  document.documentElement.dataset.connected = String(connected);
  showTop();
  showBanner();
});

document.addEventListener("key-changed", () => {
  learn();
  reconnect();
});

// ---- views

async function route() {
  const isCluster = location.hash.startsWith("#/cluster");
  $("#chat").hidden = isCluster;
  $("#cluster").hidden = !isCluster;
  for (const [link, here] of [
    ["#to-chat", !isCluster],
    ["#to-cluster", isCluster],
  ]) {
    if (here) $(link).setAttribute("aria-current", "page");
    else $(link).removeAttribute("aria-current");
  }
  sidebar.openSidebar(false);
  if (isCluster) {
    document.title = "Cluster · ggmq";
    showCluster();
  } else {
    const id = /^#\/c\/([0-9a-f]+)$/.exec(location.hash)?.[1];
    if (id !== chat.current().id) {
      const found = id ? (running.get(id)?.conversation ?? (await store.load(id))) : null;
      chat.show(found ?? undefined);
      if (id && !found) history.replaceState(null, "", "#/");
    } else chat.show(chat.current());
    $("#to-chat").href = chat.current().leaf ? `#/c/${chat.current().id}` : "#/";
    if (!matchMedia("(pointer: coarse)").matches) $("#field").focus();
  }
  showBanner();
  sidebar.refresh();
}

function begin() {
  location.hash = "#/";
  if (chat.current().leaf) chat.show();
  $("#field").focus();
}

addEventListener("hashchange", route);

store.onChange(async ({ kind, id, here }) => {
  if (id === chat.current().id) {
    if (kind === "deleted") {
      running.get(id)?.stop();
      chat.show();
      location.hash = "#/";
    } else if (!here && !running.has(id)) {
      const found = await store.load(id);
      const now = chat.current();
      if (found && now.id === id && !running.has(id)) {
        if (now.leaf in found.nodes && found.leaf !== now.leaf && !store.pathOf(found).some((node) => node.id === now.leaf))
          found.leaf = now.leaf;
        if (!$(".edit")) chat.show(found);
      }
    }
    if (chat.current().leaf) $("#to-chat").href = `#/c/${chat.current().id}`;
  }
  sidebar.refresh();
});

// ---- light and dark

const themeButton = $("#theme");

function nameTheme() {
  themeButton.querySelector("span").textContent = isDark() ? "Light" : "Dark";
}

themeButton.addEventListener("click", () => {
  change({ theme: isDark() ? "light" : "dark" });
  nameTheme();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", nameTheme);
document.addEventListener("theme-changed", nameTheme);

// ---- keys

const KEYS = {
  KeyN: begin,
  KeyM: () => $("#field").focus(),
  KeyF: () => {
    sidebar.openSidebar(true);
    $("#search").focus();
  },
  KeyR: chat.regenerate,
  KeyE: chat.editLast,
  KeyC: () => (location.hash = location.hash.startsWith("#/cluster") ? `#/c/${chat.current().id}` : "#/cluster"),
  KeyS: () => dialogs.openSettings(),
  KeyH: () => dialogs.openHelp(),
  KeyD: () => themeButton.click(),
};

const isMac = /Mac|iP/.test(navigator.platform); // where Option alone writes letters

addEventListener("keydown", (event) => {
  if ($("dialog[open]")) return;
  if (event.key === "Escape") {
    if (sidebar.sidebarIsOpen()) sidebar.openSidebar(false);
    else if (!chat.stop()) return;
    event.preventDefault();
  } else if (event.altKey && event.ctrlKey === isMac && !event.metaKey && KEYS[event.code]) {
    event.preventDefault();
    KEYS[event.code]();
  }
});

// ---- buttons that are in the page from the start

for (const [id, act] of [
  ["menu", () => sidebar.openSidebar(!sidebar.sidebarIsOpen())],
  ["close-sidebar", () => sidebar.openSidebar(false)],
  ["shade", () => sidebar.openSidebar(false)],
  ["new", begin],
  ["open-settings", () => dialogs.openSettings()],
  ["open-help", () => dialogs.openHelp()],
  ["export-all", sidebar.exportAll],
  ["export-json", () => sidebar.exportCurrent("json")],
  ["export-markdown", () => sidebar.exportCurrent("markdown")],
  ["remove-all", sidebar.removeAll],
])
  $(`#${id}`).addEventListener("click", act);

$("#import").addEventListener("change", async ({ target }) => {
  const [file] = target.files;
  target.value = "";
  if (file) $("#imported").textContent = await sidebar.importFrom(file);
});

for (const el of document.querySelectorAll("[data-icon]")) el.prepend(icon(el.dataset.icon));

showTheme();
nameTheme();
chat.begin(server);
route();
learn();
reconnect();
if (!(await store.isLasting())) {
  $("#not-kept").hidden = false;
}
