// An answer that is being made: the request, its stream, and what came of it.

import { ApiError, ask, errorOf, eventsOf } from "./api.js";
import { newId } from "./dom.js";
import { settings } from "./settings.js";
import { pathOf, save } from "./store.js";

const SAVE_MS = 1500;
const SOON_MS = 300; // in less no rate can be measured

/** Answers that are being made, by conversation. */
export const running = new Map();

function messagesFor(conversation) {
  const messages = [];
  for (const { role, content } of pathOf(conversation)) {
    const last = messages.at(-1);
    if (last?.role === role)
      last.content += `\n\n${content}`; // one that got no answer; templates want turns
    else messages.push({ role, content });
  }
  if (settings.system.trim() && messages[0]?.role !== "system")
    messages.unshift({ role: "system", content: settings.system });
  return messages;
}

export class Answer {
  /** @param told called after each piece and at the end */
  constructor(conversation, model, told) {
    this.conversation = conversation;
    this.told = told;
    this.problem = null;
    this.abort = new AbortController();
    this.node = {
      id: newId(),
      parent: conversation.leaf,
      role: "assistant",
      content: "",
      time: Date.now(),
      model,
      ended: "open",
    };
    this.body = {
      ...(model && { model }),
      messages: messagesFor(conversation),
      stream: true,
      stream_options: { include_usage: true },
    };
    for (const name of ["temperature", "top_p", "max_tokens"]) if (settings[name] !== null) this.body[name] = settings[name];
    if (!settings.reasoning) this.body.chat_template_kwargs = { enable_thinking: false };
  }

  get started() {
    return this.node.id in this.conversation.nodes;
  }

  stop() {
    this.abort.abort();
  }

  #begin() {
    this.conversation.nodes[this.node.id] = this.node;
    this.conversation.leaf = this.node.id;
  }

  #take(chunk, clock) {
    const { node } = this;
    const [choice] = chunk.choices ?? [];
    const { content, reasoning_content: reasoning } = choice?.delta ?? {};
    const now = performance.now();
    if (reasoning) {
      clock.thought ??= now;
      node.reasoning = (node.reasoning ?? "") + reasoning;
      node.reasoningS = (now - clock.thought) / 1000;
    }
    if (content) node.content += content;
    if (content || reasoning) {
      clock.first ??= now;
      clock.last = now;
      clock.n += 1;
      if (!this.started) this.#begin();
    }
    if (choice?.finish_reason) clock.reason = choice.finish_reason;
    clock.usage = chunk.usage ?? clock.usage;
    clock.timings = chunk.timings ?? clock.timings;
  }

  async run() {
    const { node, conversation } = this;
    running.set(conversation.id, this);
    const clock = { start: performance.now(), n: 0 };
    let saved = performance.now();
    try {
      for await (const data of eventsOf(await ask("v1/chat/completions", { body: this.body, signal: this.abort.signal }))) {
        if (data === "[DONE]") break;
        const chunk = JSON.parse(data);
        if (chunk.error) throw errorOf(chunk.error);
        this.#take(chunk, clock);
        this.told(this);
        if (this.started && performance.now() - saved > SAVE_MS) {
          saved = performance.now();
          save(conversation).catch(() => {});
        }
      }
      if (!clock.reason) throw new ApiError(0, "the answer broke off");
      if (!this.started) this.#begin(); // an empty answer is an answer
      node.ended = clock.reason;
    } catch (error) {
      if (error.name === "AbortError") node.ended = "stopped";
      else {
        this.problem = error instanceof ApiError ? error : new ApiError(0, `the answer could not be read: ${error.message}`);
        Object.assign(node, { ended: "broken", problem: this.problem.message });
      }
    }
    this.#count(clock);
    running.delete(conversation.id);
    this.over = true;
    conversation.updated = Date.now();
    this.told(this);
  }

  #count({ start, first, last, n, usage, timings }) {
    const stats = {
      first_s: ((first ?? performance.now()) - start) / 1000,
      n_made: usage?.completion_tokens ?? timings?.predicted_n ?? n,
    };
    if (usage?.prompt_tokens !== undefined) stats.n_prompt = usage.prompt_tokens;
    const cached = usage?.prompt_tokens_details?.cached_tokens ?? timings?.cache_n;
    if (cached !== undefined) stats.n_cached = cached;
    const rate =
      timings?.predicted_per_second ?? (last - first > SOON_MS ? ((stats.n_made - 1) * 1000) / (last - first) : 0);
    if (rate > 0) stats.rate = rate;
    this.node.stats = stats;
  }
}
