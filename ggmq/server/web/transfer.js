// Conversations to files and back: JSON has all of them, Markdown the messages that are shown.

import { newId } from "./dom.js";
import { newConversation, pathOf } from "./store.js";

const FORMAT = "ggmq-conversations";
const MOST_BYTES = 64 << 20;
const ID = /^[0-9a-f]{8,64}$/;
const ROLES = new Set(["system", "user", "assistant"]);

export function toJson(conversations) {
  const all = conversations.map((c) => ({
    id: c.id,
    title: c.title,
    named: c.named,
    created: c.created,
    updated: c.updated,
    leaf: c.leaf,
    nodes: c.nodes,
    messages: pathOf(c).map(({ role, content }) => ({ role, content })),
  }));
  return JSON.stringify({ format: FORMAT, version: 1, conversations: all }, null, 1);
}

export function toMarkdown(conversation) {
  const parts = [`# ${conversation.title || "Conversation"}`];
  for (const node of pathOf(conversation)) {
    const who = { user: "You", system: "System" }[node.role] ?? (node.model || "Assistant");
    parts.push(`## ${who}`);
    if (node.reasoning)
      parts.push(
        node.reasoning
          .trim()
          .split("\n")
          .map((line) => `> ${line}`)
          .join("\n"),
      );
    parts.push(node.content.trim());
  }
  return `${parts.join("\n\n")}\n`;
}

export const fileName = (title) =>
  (title || "conversation")
    .replace(/[^\p{L}\p{N}]+/gu, "-")
    .replace(/^-|-$/g, "")
    .slice(0, 60) || "conversation";

function text(value, where) {
  if (typeof value !== "string") throw new Error(`${where}: expected a text`);
  return value;
}

const time = (value) => (Number.isFinite(value) && value > 0 ? value : Date.now());

function nodeOf(raw, id, where) {
  if (raw === null || typeof raw !== "object") throw new Error(`${where}: expected a message`);
  if (!ROLES.has(raw.role)) throw new Error(`${where}.role: expected system, user or assistant`);
  const node = {
    id,
    parent: raw.parent ?? null,
    role: raw.role,
    content: text(raw.content, `${where}.content`),
    time: time(raw.time),
  };
  for (const name of ["reasoning", "model", "ended", "problem"]) if (typeof raw[name] === "string") node[name] = raw[name];
  if (typeof raw.reasoningS === "number") node.reasoningS = raw.reasoningS;
  if (raw.stats !== null && typeof raw.stats === "object") {
    node.stats = Object.fromEntries(Object.entries(raw.stats).filter(([, v]) => typeof v === "number"));
  }
  return node;
}

function fromMessages(messages, where, title) {
  const conversation = newConversation(title);
  messages.forEach((raw, i) => {
    const node = { ...nodeOf(raw, newId(), `${where}[${i}]`), parent: conversation.leaf, time: conversation.created + i };
    conversation.nodes[node.id] = node;
    conversation.leaf = node.id;
  });
  const first = messages.find((message) => message.role === "user")?.content ?? "";
  conversation.title = title || first.slice(0, 60) || "Imported";
  return conversation;
}

function fromTree(raw, where) {
  if (raw === null || typeof raw !== "object") throw new Error(`${where}: expected a conversation`);
  if (raw.nodes === undefined && Array.isArray(raw.messages))
    return fromMessages(raw.messages, `${where}.messages`, text(raw.title ?? "", `${where}.title`));
  if (raw.nodes === null || typeof raw.nodes !== "object") throw new Error(`${where}.nodes: expected messages by id`);
  if (!ID.test(raw.id)) throw new Error(`${where}.id: expected hexadecimal digits`);
  const nodes = {};
  for (const [id, node] of Object.entries(raw.nodes)) {
    if (!ID.test(id)) throw new Error(`${where}.nodes: expected ids of hexadecimal digits`);
    nodes[id] = nodeOf(node, id, `${where}.nodes.${id}`);
  }
  const rooted = new Set([null]);
  for (const node of Object.values(nodes)) {
    const way = new Set();
    for (let id = node.id; !rooted.has(id); id = nodes[id].parent) {
      if (!Object.hasOwn(nodes, id) || way.has(id))
        throw new Error(`${where}.nodes.${node.id}.parent: expected another message, without a circle`);
      way.add(id);
    }
    for (const id of way) rooted.add(id);
  }
  if (raw.leaf !== null && !Object.hasOwn(nodes, raw.leaf))
    throw new Error(`${where}.leaf: expected a message of the conversation`);
  return {
    id: raw.id,
    title: text(raw.title, `${where}.title`),
    named: raw.named === true,
    created: time(raw.created),
    updated: time(raw.updated),
    nodes,
    leaf: raw.leaf,
  };
}

/** Conversations of an exported file, or one of a list of messages, as `/save` of a chat at a terminal writes it. */
export async function fromFile(file) {
  if (file.size > MOST_BYTES) throw new Error(`${file.name}: expected at most 64 MiB`);
  let found;
  try {
    found = JSON.parse(await file.text());
  } catch {
    throw new Error(`${file.name}: expected JSON`);
  }
  if (Array.isArray(found)) return [fromMessages(found, "messages", file.name.replace(/\.json$/, ""))];
  if (found?.format !== FORMAT || !Array.isArray(found.conversations))
    throw new Error(`${file.name}: expected conversations that this page exported, or a list of messages`);
  return found.conversations.map((one, i) => fromTree(one, `conversations[${i}]`));
}
