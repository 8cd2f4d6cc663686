// Conversations, kept in the browser's IndexedDB: heads to list, bodies to read.
//
// A conversation is a tree of messages, `nodes`, that only grows: an edit or another answer is a sibling. So two tabs that
// write to the same conversation lose nothing: what is kept is the union of both.

import { newId } from "./dom.js";

export const MOST_CONVERSATIONS = 1000;
export const MOST_CHARACTERS = 100_000_000;

const channel = "BroadcastChannel" in globalThis ? new BroadcastChannel("ggmq") : null;
const listeners = new Set();
const memory = new Map(); // what there is where the browser keeps nothing
let database; // a promise of it, or of null

/** Told of `{kind: "saved" | "deleted", id}`, whichever tab did it. */
export function onChange(listener) {
  listeners.add(listener);
}

function tell(kind, id) {
  channel?.postMessage({ kind, id });
  for (const listener of listeners) listener({ kind, id, here: true });
}

channel?.addEventListener("message", ({ data }) => {
  for (const listener of listeners) listener({ ...data, here: false });
});

function opened() {
  database ??= new Promise((resolve) => {
    let request;
    try {
      request = indexedDB.open("ggmq", 1);
    } catch {
      return resolve(null);
    }
    request.onupgradeneeded = () => {
      request.result.createObjectStore("heads", { keyPath: "id" });
      request.result.createObjectStore("bodies", { keyPath: "id" });
    };
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => resolve(null);
  });
  return database;
}

/** True if conversations outlast the page. */
export const isLasting = async () => (await opened()) !== null;

const result = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

const ended = (transaction) =>
  new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve();
    transaction.onabort = () => reject(transaction.error);
  });

export function newConversation(title = "") {
  const now = Date.now();
  return { id: newId(), title, named: false, created: now, updated: now, nodes: {}, leaf: null };
}

/** Messages from the first to the leaf. */
export function pathOf(conversation) {
  const path = [];
  for (let node = conversation.nodes[conversation.leaf]; node; node = conversation.nodes[node.parent]) path.unshift(node);
  return path;
}

/** Messages that answer the same one, the oldest first. */
export function siblingsOf(conversation, node) {
  return Object.values(conversation.nodes)
    .filter((other) => other.parent === node.parent && other.role === node.role)
    .sort((a, b) => a.time - b.time || (a.id < b.id ? -1 : 1));
}

/** The newest message below a node, by its newest answers. */
export function tipBelow(conversation, node) {
  for (;;) {
    const below = Object.values(conversation.nodes).filter((other) => other.parent === node.id);
    if (!below.length) return node;
    node = below.reduce((a, b) => (b.time >= a.time ? b : a));
  }
}

const size = (body) =>
  Object.values(body.nodes).reduce((n, m) => n + m.content.length + (m.reasoning?.length ?? 0) + 100, 0);

function headOf(conversation) {
  const { id, title, named, created, updated } = conversation;
  return { id, title, named, created, updated, size: size(conversation), n: Object.keys(conversation.nodes).length };
}

export async function list() {
  const db = await opened();
  const heads = db ? await result(db.transaction("heads").objectStore("heads").getAll()) : [...memory.values()].map(headOf);
  return heads.sort((a, b) => b.updated - a.updated);
}

export async function load(id) {
  const db = await opened();
  if (!db) return memory.has(id) ? structuredClone(memory.get(id)) : null;
  const transaction = db.transaction(["heads", "bodies"]);
  const [head, body] = await Promise.all([
    result(transaction.objectStore("heads").get(id)),
    result(transaction.objectStore("bodies").get(id)),
  ]);
  return head && body ? { ...body, ...head } : null;
}

/**
 * Keep a conversation, together with what another tab has added to it. The oldest ones make room.
 * Returns: titles of those that had to go.
 */
export async function save(conversation) {
  const db = await opened();
  if (!db) {
    memory.set(conversation.id, structuredClone(conversation));
    tell("saved", conversation.id);
    return [];
  }
  const transaction = db.transaction(["heads", "bodies"], "readwrite");
  const done = ended(transaction);
  const heads = transaction.objectStore("heads");
  const bodies = transaction.objectStore("bodies");
  const [kept, head] = await Promise.all([result(bodies.get(conversation.id)), result(heads.get(conversation.id))]);
  for (const [id, node] of Object.entries(kept?.nodes ?? {})) {
    const mine = conversation.nodes[id];
    const isNewer = mine?.ended === "open" && (node.ended !== "open" || node.content.length > mine.content.length);
    if (!mine || isNewer) conversation.nodes[id] = node; // another tab made it
  }
  if (head && head.named && !conversation.renamed) Object.assign(conversation, { title: head.title, named: true });
  bodies.put({ id: conversation.id, nodes: conversation.nodes, leaf: conversation.leaf });
  heads.put(headOf(conversation));
  const all = (await result(heads.getAll())).sort((a, b) => a.updated - b.updated);
  let n = all.length;
  let characters = all.reduce((sum, one) => sum + one.size, 0);
  const gone = [];
  for (const one of all) {
    if (n <= MOST_CONVERSATIONS && characters <= MOST_CHARACTERS) break;
    if (one.id === conversation.id) continue;
    heads.delete(one.id);
    bodies.delete(one.id);
    gone.push(one);
    n -= 1;
    characters -= one.size;
  }
  await done;
  tell("saved", conversation.id);
  for (const one of gone) tell("deleted", one.id);
  return gone.map((one) => one.title);
}

export async function remove(id) {
  const db = await opened();
  if (db) {
    const transaction = db.transaction(["heads", "bodies"], "readwrite");
    transaction.objectStore("heads").delete(id);
    transaction.objectStore("bodies").delete(id);
    await ended(transaction);
  }
  memory.delete(id);
  tell("deleted", id);
}

/** Ids of conversations whose title or messages have all the words. */
export async function search(text) {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  const found = new Set();
  for (const head of await list()) {
    const conversation = await load(head.id);
    if (!conversation) continue;
    const all = [head.title, ...Object.values(conversation.nodes).map((node) => node.content)].join("\n").toLowerCase();
    if (words.every((word) => all.includes(word))) found.add(head.id);
  }
  return found;
}
