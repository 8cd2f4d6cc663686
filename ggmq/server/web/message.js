// One message as an element: its text, its reasoning, what it cost, and what can be done with it.

import { copyButton, h, icon, iconButton } from "./dom.js";
import { Growing } from "./markdown.js";
import { siblingsOf } from "./store.js";
import { count, duration, plural, rate } from "./words.js";

const ENDS = {
  length: "cut: the limit of tokens",
  stopped: "stopped",
  broken: "broken off",
  open: "unfinished",
  context: "cut: the context is full",
};

function timings(node) {
  const { stats } = node;
  if (!stats) return [];
  const words = [plural(stats.n_made, "token")];
  if (stats.rate) words.push(`${rate(stats.rate)} tokens/s`);
  words.push(`first after ${duration(stats.first_s)}`);
  if (stats.n_prompt)
    words.push(`prompt ${count(stats.n_prompt)}${stats.n_cached ? `, ${count(stats.n_cached)} known` : ""}`);
  return words;
}

export class Message {
  /** @param acts what can be done: `again(node) edit(node, text) choose(node)` */
  constructor(node, conversation, acts) {
    this.node = node;
    this.conversation = conversation;
    this.acts = acts;
    this.body = h("div", { class: "body" });
    this.foot = h("footer", { class: "message-foot" });
    const who = node.role === "user" ? "You" : node.role === "system" ? "System" : node.model || "Model";
    this.element = h(
      "article",
      { class: `message from-${node.role}`, "aria-label": who, data: { id: node.id } },
      h("h2", { class: "who" }, who),
      this.body,
      this.foot,
    );
    if (node.role === "assistant") this.growing = new Growing(this.body);
  }

  #reason() {
    const { node } = this;
    if (!node.reasoning) return;
    if (!this.reasoning) {
      this.reasoning = h("div", { class: "body" });
      this.reasoned = new Growing(this.reasoning);
      this.summary = h("span", {});
      this.details = h("details", { class: "reasoning" }, h("summary", {}, icon("right"), this.summary), this.reasoning);
      this.details.addEventListener("toggle", () => this.details.open && this.#showReasoning());
      this.body.before(this.details);
    }
    const thinking = node.ended === "open" && !node.content;
    this.summary.textContent = thinking
      ? "Reasoning…"
      : `Reasoning${node.reasoningS ? `, ${duration(node.reasoningS)}` : ""}`;
    if (this.details.open) this.#showReasoning();
  }

  #showReasoning() {
    this.reasoned.show(this.node.reasoning);
    if (this.node.ended !== "open" || this.node.content) this.reasoned.finish();
  }

  /** Show what has come so far. */
  grow(note) {
    this.element.setAttribute("aria-busy", "true");
    this.element.classList.add("is-open");
    this.#reason();
    this.growing.show(this.node.content);
    if (!this.note) this.foot.replaceChildren((this.note = h("span", { class: "note" })));
    if (this.note.textContent !== note) this.note.textContent = note;
  }

  /** The message is whole. */
  finish() {
    const { node } = this;
    this.note = null;
    this.element.removeAttribute("aria-busy");
    this.element.classList.remove("is-open");
    if (node.role === "assistant") {
      this.#reason();
      this.growing.show(node.content);
      this.growing.finish();
    } else this.body.replaceChildren(h("div", { class: "plain" }, node.content));
    this.#showFoot();
  }

  #showFoot() {
    const { node, acts } = this;
    const siblings = siblingsOf(this.conversation, node);
    const at = siblings.findIndex((other) => other.id === node.id);
    const step = (by, name, label) =>
      iconButton(name, label, () => acts.choose(siblings[at + by]), { disabled: !siblings[at + by] });
    const end = ENDS[node.ended];
    this.foot.replaceChildren(
      h(
        "div",
        { class: "acts" },
        copyButton(node.role === "assistant" ? "Copy answer" : "Copy message", () => node.content),
        node.role === "assistant" && iconButton("again", "Another answer", () => acts.again(node)),
        iconButton("edit", node.role === "assistant" ? "Edit answer" : "Edit message", () => this.edit()),
        siblings.length > 1 &&
          h(
            "span",
            { class: "versions" },
            step(-1, "left", "Earlier version"),
            h("span", {}, `${at + 1}/${siblings.length}`),
            step(1, "right", "Later version"),
          ),
      ),
      h(
        "div",
        { class: "facts" },
        end && h("span", { class: "end", title: node.problem }, end),
        timings(node).map((words) => h("span", {}, words)),
      ),
    );
  }

  edit() {
    const { node, acts } = this;
    const area = h("textarea", { rows: Math.min(14, node.content.split("\n").length + 1), "aria-label": "Edited text" });
    area.value = node.content;
    const isUser = node.role === "user";
    const done = () => {
      if (area.value.trim() && area.value !== node.content) acts.edit(node, area.value);
      else leave();
    };
    const leave = () => {
      form.remove();
      this.body.hidden = this.foot.hidden = false;
      this.element.querySelector('[aria-label^="Edit"]')?.focus();
    };
    const form = h(
      "div",
      { class: "edit" },
      area,
      h(
        "div",
        { class: "row" },
        h("button", { type: "button", class: "button primary", onclick: done }, isUser ? "Send" : "Keep"),
        h("button", { type: "button", class: "button", onclick: leave }, "Cancel"),
        h(
          "span",
          { class: "hint" },
          isUser ? "What came after it stays, as an earlier version." : "The answer before stays, as an earlier version.",
        ),
      ),
    );
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") leave();
      else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) done();
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    this.body.hidden = this.foot.hidden = true;
    this.body.before(form);
    area.focus();
  }
}
