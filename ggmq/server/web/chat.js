// The conversation that is shown, and the field to write in.

import { Answer, running } from "./answer.js";
import { askJson } from "./api.js";
import { $, announce, h, icon, isTouch, newId } from "./dom.js";
import { feed, lostWorkers, onFeed } from "./feed.js";
import { Message } from "./message.js";
import { change, settings } from "./settings.js";
import { newConversation, pathOf, save, tipBelow } from "./store.js";
import { strip, stripKey } from "./strip.js";
import { count, plural } from "./words.js";

const NEAR_PX = 48; // so near to the end counts as at the end
const DRAFT = "ggmq.draft";
const COUNT_MS = 400;
const MOST_COUNTED = 40_000; // characters of a draft whose tokens are counted
const ANNOUNCED = 4000; // characters of an answer that are read out by themselves

const thread = $("#thread");
const list = $("#messages");
const empty = $("#empty");
const field = $("#field");
const sendButton = $("#send");
const latest = $("#latest");
const meter = $("#meter");
const problemPlace = $("#problem");

let server; // what app.js knows of the server: {models, props, model()}
let conversation = newConversation();
let shown = new Map(); // node id → Message
let following = true;
let lastTop = 0;
let frame = 0;
let costMs = 0; // of the last time that a growing answer was shown
let draftTokens = 0;
let countdown = 0;
const problems = new Map(); // conversation id → ApiError of its last request

export const current = () => conversation;

// ---- what is shown

function messageOf(node) {
  const found = shown.get(node.id);
  if (found?.node === node && found.conversation === conversation) return found;
  const message = new Message(node, conversation, acts);
  const answer = running.get(conversation.id);
  if (answer?.node !== node) message.finish();
  shown.set(node.id, message);
  return message;
}

/** The whole conversation, as it is now. */
export function render() {
  const answer = running.get(conversation.id);
  const path = pathOf(conversation);
  if (answer && !path.includes(answer.node)) path.push(answer.node);
  const messages = path.map(messageOf);
  const kept = new Set(path.map((node) => node.id));
  shown = new Map([...shown].filter(([id]) => kept.has(id)));
  list.replaceChildren(...messages.map((message) => message.element));
  empty.hidden = path.length > 0;
  if (!path.length) renderEmpty(true);
  if (answer) shown.get(answer.node.id)?.grow(noteFor(answer));
  showProblem();
  showSend();
  showMeter();
  document.title = `${conversation.title || "New conversation"} · ggmq`;
  $("#title").textContent = conversation.title || "New conversation";
}

let emptyKey = "";

function renderEmpty(always = false) {
  if (empty.hidden) return;
  const model = server?.model();
  const place = $("#empty-cluster");
  const known = feed.snapshot?.models.find((one) => one.name === model);
  const key = `${model} ${known ? stripKey(feed.snapshot, known) : ""}`;
  if (key === emptyKey && !always) return;
  emptyKey = key;
  $("#empty-model").textContent = model ?? "No model yet";
  if (!known) return place.replaceChildren();
  const devices = new Set();
  const hosts = new Set();
  for (const host of feed.snapshot.hosts) {
    for (const worker of host.workers) {
      for (const device of worker.devices ?? []) {
        if (!device.layers?.some((held) => held.model === model)) continue;
        devices.add(`${worker.name}/${device.index}`);
        hosts.add(host.name);
      }
    }
  }
  place.replaceChildren(
    strip(feed.snapshot, known, { labels: true }),
    h(
      "p",
      { class: "quiet" },
      `${plural(known.n_layers, "layer")} on ${plural(devices.size, "device")} of ${plural(hosts.size, "host")}. Conversations stay in this browser.`,
    ),
  );
}

function noteFor(answer) {
  const { node } = answer;
  if (node.content || node.reasoning) return "";
  const slots = feed.snapshot?.slots ?? [];
  const reading = slots.filter((slot) => slot.state === "prompt");
  if (reading.length === 1 && reading[0].n_prompt)
    return `Reading the prompt: ${count(reading[0].n_read)} of ${plural(reading[0].n_prompt, "token")}`;
  if (feed.snapshot?.queue.waiting) return `Waiting: ${count(feed.snapshot.queue.waiting)} in the queue`;
  return "Waiting for the first token";
}

/** At most once a frame, and seldomer where showing takes long. */
function schedule() {
  if (frame) return;
  const wait = Math.min(400, costMs * 4);
  frame = 1;
  setTimeout(() => requestAnimationFrame(draw), wait > 16 ? wait : 0);
}

function draw() {
  frame = 0;
  const answer = running.get(conversation.id);
  if (!answer) return;
  const start = performance.now();
  if (!shown.has(answer.node.id)) return render();
  shown.get(answer.node.id).grow(noteFor(answer));
  follow();
  costMs = performance.now() - start;
}

function follow() {
  if (following) thread.scrollTop = lastTop = thread.scrollHeight;
  latest.hidden = following;
}

thread.addEventListener(
  "scroll",
  () => {
    const top = thread.scrollTop;
    if (top < lastTop - 2) following = false;
    if (thread.scrollHeight - top - thread.clientHeight < NEAR_PX) following = true;
    lastTop = top;
    latest.hidden = following;
  },
  { passive: true },
);

latest.addEventListener("click", () => {
  following = true;
  follow();
  field.focus();
});

// ---- problems

const retry = (label, onclick) => h("button", { type: "button", class: "button", onclick }, label);

function explained(problem) {
  const say = (title, text, ...more) => [h("strong", {}, title), h("p", {}, text), ...more];
  if (problem.status === 401) {
    const key = h("input", { type: "password", autocomplete: "off", "aria-label": "API key", placeholder: "API key" });
    const use = (event) => {
      event.preventDefault();
      change({ key: key.value });
      document.dispatchEvent(new CustomEvent("key-changed"));
      again();
    };
    return say(
      "The server asks for a key",
      "Whoever runs it has one. It stays in this tab unless the settings say otherwise.",
      h("form", { class: "row", onsubmit: use }, key, h("button", { class: "button primary" }, "Use it")),
    );
  }
  if (problem.status === 429) {
    const button = retry("Try again", again);
    const until = Date.now() + (problem.retryAfterS ?? 1) * 1000;
    const tick = () => {
      const left = Math.ceil((until - Date.now()) / 1000);
      button.disabled = left > 0;
      button.textContent = left > 0 ? `Try again in ${left} s` : "Try again";
      if (left > 0) countdown = setTimeout(tick, 250);
    };
    tick();
    return say("The server is full", problem.message, button);
  }
  if (problem.status === 503) {
    const lost = lostWorkers(feed.snapshot).map((worker) => worker.name);
    const missing = lost.length ? `Lost: ${lost.join(", ")}. ` : "";
    return say(
      "The cluster cannot answer now",
      `${missing}${problem.message}`,
      h(
        "div",
        { class: "row" },
        retry("Try again", again),
        h("a", { class: "button", href: "#/cluster" }, "See the cluster"),
      ),
    );
  }
  if (problem.status === 0) return say("No connection", problem.message, retry("Try again", again));
  return say(`Refused (${problem.status})`, problem.message, retry("Try again", again));
}

function showProblem() {
  clearTimeout(countdown);
  const problem = problems.get(conversation.id);
  const path = pathOf(conversation);
  const waits = path.at(-1)?.role === "user" && !running.has(conversation.id);
  if (problem) problemPlace.replaceChildren(h("div", { class: "problem" }, icon("warn"), h("div", {}, explained(problem))));
  else if (waits)
    problemPlace.replaceChildren(
      h("div", { class: "row unanswered" }, h("span", { class: "quiet" }, "No answer yet."), retry("Get an answer", again)),
    );
  else problemPlace.replaceChildren();
}

/** The server can be asked again: a problem with reaching it is over. */
export function forget(statuses) {
  const problem = problems.get(conversation.id);
  if (problem && statuses.includes(problem.status)) {
    problems.delete(conversation.id);
    showProblem();
  }
}

// ---- what can be done

async function keep(which) {
  try {
    const gone = await save(which);
    if (gone.length) announce(`${plural(gone.length, "old conversation")} made room`);
  } catch {
    announce("The browser did not keep the conversation");
  }
}

async function answerTo(which) {
  const model = server?.model();
  if (running.has(which.id)) return;
  problems.delete(which.id);
  const answer = new Answer(which, model ?? "", (told) => {
    if (which === conversation && !told.over) schedule();
  });
  const done = answer.run();
  following = true;
  if (which === conversation) render();
  follow();
  await keep(which);
  await done;
  if (answer.problem) problems.set(which.id, answer.problem);
  if (which === conversation) {
    shown.get(answer.node.id)?.finish();
    if (!answer.started) shown.delete(answer.node.id);
    render();
    follow();
  }
  const { content } = answer.node;
  if (answer.problem) announce(`Problem: ${answer.problem.message}`);
  else if (answer.node.ended === "stopped") announce("Stopped");
  else announce(`Answer: ${content.length > ANNOUNCED ? `${content.slice(0, ANNOUNCED)} … and more` : content}`);
  await keep(which);
}

function add(role, content, parent, more = {}) {
  const node = { id: newId(), parent, role, content, time: Date.now(), ...more };
  conversation.nodes[node.id] = node;
  conversation.leaf = node.id;
  conversation.updated = node.time;
  return node;
}

function again() {
  const last = pathOf(conversation).at(-1);
  if (last?.role === "assistant") conversation.leaf = last.parent;
  problems.delete(conversation.id);
  if (conversation.leaf) answerTo(conversation);
}

const acts = {
  again(node) {
    if (running.has(conversation.id)) return;
    conversation.leaf = node.parent;
    answerTo(conversation);
  },
  edit(node, text) {
    stop();
    add(node.role, text, node.parent, node.role === "assistant" ? { model: node.model } : {});
    if (node.role === "user") answerTo(conversation);
    else {
      keep(conversation);
      render();
    }
  },
  choose(node) {
    if (running.has(conversation.id)) return;
    conversation.leaf = tipBelow(conversation, node).id;
    keep(conversation);
    render();
    const versions = shown.get(node.id)?.element.querySelectorAll(".versions button:not(:disabled)");
    versions?.[0]?.focus();
  },
};

export function stop() {
  const answer = running.get(conversation.id);
  answer?.stop();
  return Boolean(answer);
}

export function regenerate() {
  const last = pathOf(conversation).at(-1);
  if (last && !running.has(conversation.id)) again();
}

export function editLast() {
  const last = pathOf(conversation).findLast((node) => node.role === "user");
  if (last && !running.has(conversation.id)) shown.get(last.id)?.edit();
}

function send() {
  const text = field.value;
  if (!text.trim() || running.has(conversation.id)) return;
  const isNew = conversation.leaf === null;
  add("user", text, conversation.leaf);
  if (isNew && !conversation.named) conversation.title = text.trim().split("\n")[0].slice(0, 80);
  field.value = "";
  draftChanged();
  answerTo(conversation);
  if (isNew) history.replaceState(null, "", `#/c/${conversation.id}`);
}

/** Show another conversation; a new one without a word. */
export function show(which = newConversation()) {
  if (which.id !== conversation.id) following = true;
  conversation = running.get(which.id)?.conversation ?? which;
  shown.clear();
  render();
  follow();
}

// ---- the field

function showSend() {
  const busy = running.has(conversation.id);
  sendButton.replaceChildren(icon(busy ? "stop" : "send"));
  sendButton.setAttribute("aria-label", busy ? "Stop" : "Send");
  sendButton.title = busy ? "Stop (Esc)" : "Send (Ctrl+Enter)";
  sendButton.classList.toggle("is-stop", busy);
  sendButton.disabled = !busy && !field.value.trim();
}

let counting = 0;

function countDraft() {
  clearTimeout(counting);
  const text = field.value;
  draftTokens = Math.ceil(text.length / 4);
  if (!text || text.length > MOST_COUNTED) return;
  counting = setTimeout(async () => {
    try {
      const { tokens } = await askJson("tokenize", { body: { content: text } });
      if (field.value !== text) return;
      draftTokens = tokens.length;
      showMeter();
    } catch {
      // the guess stays
    }
  }, COUNT_MS);
}

function showMeter() {
  const size = server?.contextSize();
  const last = pathOf(conversation).findLast((node) => node.stats?.n_prompt);
  const used = (last ? last.stats.n_prompt + last.stats.n_made : 0) + draftTokens;
  meter.hidden = !size;
  if (!size) return;
  const part = Math.min(1, used / size);
  meter.replaceChildren(
    h("span", { class: "meter-bar", "aria-hidden": "true" }, h("span", { vars: { "--part": part } })),
    h("span", {}, `${count(used)} of ${count(size)} tokens`),
  );
  meter.classList.toggle("is-full", part > 0.9);
  meter.title = "How much of the model's context this conversation takes";
}

function draftChanged() {
  field.style.height = "auto";
  field.style.height = `${Math.min(field.scrollHeight + 2, innerHeight * 0.4)}px`;
  try {
    sessionStorage.setItem(DRAFT, field.value);
  } catch {
    // then it does not outlast a reload
  }
  countDraft();
  showSend();
  showMeter();
}

field.addEventListener("input", draftChanged);
field.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.isComposing) return;
  const forced = event.ctrlKey || event.metaKey;
  if (forced || (!event.shiftKey && !event.altKey && !isTouch())) {
    event.preventDefault();
    send();
  }
});
sendButton.addEventListener("click", () => (running.has(conversation.id) ? stop() : send()));

for (const button of document.querySelectorAll("#empty [data-say]")) {
  button.addEventListener("click", () => {
    field.value = button.dataset.say;
    draftChanged();
    field.focus();
  });
}

onFeed(() => {
  renderEmpty();
  if (running.has(conversation.id)) schedule();
});

/** Begin: `known` is what app.js knows of the server. */
export function begin(known) {
  server = known;
  try {
    field.value = sessionStorage.getItem(DRAFT) ?? "";
  } catch {
    // no draft is kept
  }
  draftChanged();
  render();
}

/** The server's facts have changed. */
export function refresh() {
  renderEmpty(true);
  showMeter();
}
