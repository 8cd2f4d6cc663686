// A model's text as elements. The text is hostile: HTML in it is shown as text, images become links, and what marked makes
// goes through DOMPurify, which hands out elements; nothing in the page sets HTML.

import DOMPurify from "./vendor/purify.es.mjs";
import hljs from "./vendor/highlight.core.min.js";
import { Marked } from "./vendor/marked.esm.js";
import { copyButton, h } from "./dom.js";

const LANGUAGES = new Set(
  (
    "bash c cpp csharp css diff dockerfile go ini java javascript json kotlin lua makefile markdown php python ruby rust shell sql " +
    "swift typescript xml yaml"
  ).split(" "),
);
const ALIASES = {
  sh: "bash",
  zsh: "bash",
  console: "shell",
  "c++": "cpp",
  cc: "cpp",
  h: "c",
  hpp: "cpp",
  cs: "csharp",
  patch: "diff",
  docker: "dockerfile",
  golang: "go",
  toml: "ini",
  cfg: "ini",
  js: "javascript",
  jsx: "javascript",
  mjs: "javascript",
  jsonc: "json",
  kt: "kotlin",
  make: "makefile",
  md: "markdown",
  py: "python",
  python3: "python",
  rb: "ruby",
  rs: "rust",
  ts: "typescript",
  tsx: "typescript",
  html: "xml",
  svg: "xml",
  yml: "yaml",
};
const MOST_COLOURED = 60_000; // characters: longer code stays plain

const MOST_EMPHASISED = 6000; // characters of a paragraph: marked's time for what may be emphasis grows with the square
const DEEP = /^(?: {120,}|(?:[>\t] ?){60,})(?:[-*+>]|\d+[.)])/m; // lists and quotes that nobody means

const MOST_BLANKS = 200; // of a run: more are not shown
const BLANKS = / {201,}/g;

const escaped = (text) => text.replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);

const marked = new Marked({
  gfm: true,
  breaks: true,
  tokenizer: {
    emStrong: (rest, all) => (all.length > MOST_EMPHASISED ? undefined : false), // false: as marked does it
    del: (rest, all) => (all?.length > MOST_EMPHASISED ? undefined : false),
  },
  renderer: {
    html: ({ text, block }) => (block ? `<p>${escaped(text)}</p>` : escaped(text)),
    image: ({ href, text }) => `<a href="${escaped(href)}">${escaped(text || "image")}</a>`,
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
  },
});

const PURE = {
  ALLOWED_TAGS: "a blockquote br code del em h1 h2 h3 h4 h5 h6 hr li ol p pre strong table tbody td th thead tr ul".split(
    " ",
  ),
  ALLOWED_ATTR: ["href", "title", "start", "align", "class"],
  ALLOWED_URI_REGEXP: /^(?:https?:|mailto:)/i,
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};
const PURE_CODE = { ...PURE, ALLOWED_TAGS: ["span"], ALLOWED_ATTR: ["class"] };

function tokensOf(text) {
  try {
    if (!DEEP.test(text)) return marked.lexer(text);
  } catch {
    // nested too deep in another way
  }
  return Object.assign([{ type: "code", raw: text, text, lang: "" }], { links: {} });
}

const loading = new Map();

function grammar(language) {
  if (!loading.has(language)) {
    const got = import(`./vendor/languages/${language}.min.js`).then((module) =>
      hljs.registerLanguage(language, module.default),
    );
    loading.set(
      language,
      got.catch(() => loading.delete(language)),
    );
  }
  return loading.get(language);
}

async function colour(code, language) {
  await grammar(language);
  if (!hljs.getLanguage(language)) return;
  const { value } = hljs.highlight(code.textContent, { language, ignoreIllegals: true });
  code.replaceChildren(DOMPurify.sanitize(value, PURE_CODE));
}

function finishCode(pre, whole) {
  const code = pre.firstElementChild ?? pre;
  const word = /language-(\S+)/.exec(code.className)?.[1]?.toLowerCase() ?? "";
  const language = ALIASES[word] ?? word;
  code.removeAttribute("class");
  if (whole && LANGUAGES.has(language) && code.textContent.length <= MOST_COLOURED) colour(code, language);
  pre.tabIndex = 0;
  pre.setAttribute("role", "group");
  pre.setAttribute("aria-label", word ? `Code, ${word}` : "Code");
  const figure = h("div", { class: "code" });
  pre.replaceWith(figure);
  figure.append(
    h(
      "div",
      { class: "code-bar" },
      h("span", {}, word || "text"),
      copyButton("Copy code", () => code.textContent),
    ),
    pre,
  );
}

/** Elements of text or tokens; text that marked gives up on (nested too deep) is shown as it is. */
function elements(tokens, whole) {
  let html;
  try {
    html = marked.parser(tokens);
  } catch {
    html = `<pre><code>${escaped(tokens.map((token) => token.raw).join(""))}</code></pre>`;
  }
  const fragment = DOMPurify.sanitize(html, PURE);
  for (const a of fragment.querySelectorAll("a")) {
    if (!a.hasAttribute("href")) continue;
    a.target = "_blank";
    a.rel = "noopener noreferrer nofollow";
    a.title = a.href;
  }
  for (const el of fragment.querySelectorAll("[class]:not(code)")) el.removeAttribute("class");
  for (const pre of fragment.querySelectorAll("pre")) finishCode(pre, whole);
  for (const table of fragment.querySelectorAll("table")) {
    const frame = h("div", { class: "table", tabindex: "0", role: "group", "aria-label": "Table" });
    table.replaceWith(frame);
    frame.append(table);
  }
  return fragment;
}

/** Whether a block is what it looks like: of a line that has just begun, `2` may become another item of the list before it. */
const isClear = ({ raw }) => raw.length > 12 || raw.includes("\n");

const DEFINITION = /^ {0,3}\[[^\]\n]+\]:/m; // of a link, which may be used in any block before it

/**
 * Text that grows, as elements in `place`. Blocks that are whole are made once; at each step only the last one and what
 * follows it is read again, so the cost of a long answer grows with its length and not with its square.
 */
export class Growing {
  constructor(place) {
    this.place = place;
    this.text = "";
    this.n_fixed = 0; // characters whose elements are final
    this.tail = []; // elements of the rest
  }

  /** Returns: whether anything changed. */
  show(text) {
    const clean = text.replaceAll("\r", "").replace(BLANKS, (run) => run.slice(0, MOST_BLANKS));
    if (clean === this.text) return false;
    if (!clean.startsWith(this.text.slice(0, this.n_fixed))) this.clear();
    this.text = clean;
    const rest = clean.slice(this.n_fixed);
    const tokens = tokensOf(rest);
    const blocks = tokens.filter((token) => token.type !== "space").length;
    for (const el of this.tail) el.remove();
    const last = tokens.findLastIndex((token) => token.type !== "space");
    if (blocks > 1 && isClear(tokens[last]) && tokens.map((token) => token.raw).join("") === rest) {
      const fixed = Object.assign(tokens.slice(0, last), { links: tokens.links });
      this.place.append(elements(fixed, true));
      this.n_fixed += fixed.reduce((n, token) => n + token.raw.length, 0);
      tokens.splice(0, last);
    }
    const fragment = elements(tokens, false);
    this.tail = [...fragment.childNodes];
    this.place.append(fragment);
    return true;
  }

  clear() {
    this.place.replaceChildren();
    this.tail = [];
    this.n_fixed = 0;
    this.text = "";
  }

  /** The text is whole: the last block is final too. */
  finish() {
    if (DEFINITION.test(this.text)) {
      const { text } = this;
      this.clear();
      this.text = text;
    }
    for (const el of this.tail) el.remove();
    this.place.append(elements(tokensOf(this.text.slice(this.n_fixed)), true));
    this.n_fixed = this.text.length;
    this.tail = [];
  }
}
