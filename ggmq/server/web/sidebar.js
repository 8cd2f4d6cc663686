// The list of conversations: search, rename, delete, export, import.

import { running } from "./answer.js";
import { current, show } from "./chat.js";
import { $, announce, h, iconButton, isPhone, saveFile } from "./dom.js";
import { confirmed } from "./dialogs.js";
import * as store from "./store.js";
import { fileName, fromFile, toJson, toMarkdown } from "./transfer.js";
import { plural, when } from "./words.js";

const aside = $("#sidebar");
const place = $("#conversations");
const searchField = $("#search");
const SEARCH_MS = 200;

let found = null; // ids that the search found, or null without a search

async function exported(id, kind) {
  const conversation = await store.load(id);
  if (!conversation) return;
  if (kind === "json") saveFile(`${fileName(conversation.title)}.json`, "application/json", toJson([conversation]));
  else saveFile(`${fileName(conversation.title)}.md`, "text/markdown", toMarkdown(conversation));
}

async function rename(item, head) {
  const input = h("input", { type: "text", maxlength: "200", "aria-label": "Title" });
  input.value = head.title;
  let over = false;
  const end = async (keep) => {
    if (over) return;
    over = true;
    input.blur();
    const title = input.value.trim();
    if (keep && title && title !== head.title) {
      const conversation =
        running.get(head.id)?.conversation ?? (current().id === head.id ? current() : await store.load(head.id));
      if (conversation) {
        Object.assign(conversation, { title, named: true, renamed: true });
        await store.save(conversation);
        delete conversation.renamed;
        if (conversation === current()) show(conversation);
      }
    }
    await refresh();
    $(`[data-id="${head.id}"] a`, place)?.focus();
  };
  input.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== "Escape") return;
    event.preventDefault();
    event.stopPropagation();
    end(event.key === "Enter");
  });
  input.addEventListener("blur", () => end(true));
  item.replaceChildren(input);
  input.select();
}

async function remove(head) {
  if (!(await confirmed(`Delete “${head.title}”?`, "It is in this browser only, and cannot be brought back.", "Delete")))
    return;
  running.get(head.id)?.stop();
  await store.remove(head.id);
  announce("Deleted");
  searchField.focus();
}

function itemFor(head) {
  const item = h("li", { class: "conversation", data: { id: head.id } });
  const isCurrent = head.id === current().id && !location.hash.startsWith("#/cluster");
  item.append(
    h(
      "a",
      { href: `#/c/${head.id}`, "aria-current": isCurrent ? "page" : null },
      h("span", { class: "title" }, head.title || "Without a title"),
      running.has(head.id)
        ? h("span", { class: "is-writing", title: "An answer is being written" }, "…")
        : h("time", {}, when(head.updated)),
    ),
    h(
      "div",
      { class: "item-acts" },
      iconButton("edit", `Rename ${head.title}`, () => rename(item, head)),
      iconButton("export", `Export ${head.title} as Markdown`, () => exported(head.id, "markdown")),
      iconButton("trash", `Delete ${head.title}`, () => remove(head)),
    ),
  );
  return item;
}

/** Draw the list as it is kept now. */
export async function refresh() {
  const heads = await store.list();
  if (place.contains(document.activeElement) && document.activeElement.tagName === "INPUT") return;
  const focused = place.contains(document.activeElement) ? document.activeElement.closest("[data-id]")?.dataset.id : null;
  const listed = found ? heads.filter((head) => found.has(head.id)) : heads;
  place.replaceChildren(...listed.map(itemFor));
  if (focused) $(`[data-id="${focused}"] a`, place)?.focus();
  $("#none").hidden = listed.length > 0;
  $("#none").textContent = found ? "Nothing found." : "No conversations yet.";
}

let timer = 0;
let n_searches = 0;

searchField.addEventListener("input", () => {
  clearTimeout(timer);
  timer = setTimeout(async () => {
    const n = ++n_searches;
    const text = searchField.value.trim();
    const ids = text ? await store.search(text) : null;
    if (n !== n_searches) return;
    found = ids;
    await refresh();
    if (ids) announce(`${plural(ids.size, "conversation")} found`);
  }, SEARCH_MS);
});

export async function exportAll() {
  const heads = await store.list();
  const all = [];
  for (const head of heads) all.push(await store.load(head.id));
  saveFile(
    `ggmq-conversations-${new Date().toISOString().slice(0, 10)}.json`,
    "application/json",
    toJson(all.filter(Boolean)),
  );
}

/** Returns: what came of it, in words. */
export async function importFrom(file) {
  try {
    const conversations = await fromFile(file);
    for (const conversation of conversations) await store.save(conversation);
    return `${plural(conversations.length, "conversation")} imported`;
  } catch (error) {
    return error.message;
  }
}

export async function removeAll() {
  const heads = await store.list();
  const words = `Delete ${plural(heads.length, "conversation")}?`;
  if (!heads.length || !(await confirmed(words, "They are in this browser only, and cannot be brought back.", "Delete all")))
    return;
  for (const answer of running.values()) answer.stop();
  for (const head of heads) await store.remove(head.id);
}

export function exportCurrent(kind) {
  $("#imported").textContent = current().leaf ? "" : "There is nothing in this conversation yet.";
  return exported(current().id, kind);
}

/** On a phone the list lies over the page. */
export function openSidebar(open) {
  aside.classList.toggle("is-open", open);
  document.body.classList.toggle("has-sidebar", open);
  fit();
  $("#menu").setAttribute("aria-expanded", String(open));
  if (open) searchField.focus();
  else if (isPhone() && aside.contains(document.activeElement)) $("#menu").focus();
}

export const sidebarIsOpen = () => aside.classList.contains("is-open") && isPhone();

function fit() {
  const over = isPhone() && aside.classList.contains("is-open");
  aside.inert = isPhone() && !over;
  $("#page").inert = over;
}

matchMedia("(max-width: 760px)").addEventListener("change", () => openSidebar(false));
fit();
