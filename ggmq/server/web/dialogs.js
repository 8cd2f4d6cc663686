// Settings, help, and questions: the browser's own dialogs, which hold the focus and close by Esc.

import { $, h, icon } from "./dom.js";
import { change, settings } from "./settings.js";

/** Ask before something is lost. Returns: a promise of yes or no. */
export function confirmed(title, text, word) {
  const dialog = h(
    "dialog",
    { class: "dialog small", "aria-labelledby": "question" },
    h(
      "form",
      { method: "dialog" },
      h("h2", { id: "question" }, title),
      h("p", {}, text),
      h(
        "div",
        { class: "row end" },
        h("button", { class: "button", value: "" }, "Cancel"),
        h("button", { class: "button danger", value: "yes" }, word),
      ),
    ),
  );
  document.body.append(dialog);
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      resolve(dialog.returnValue === "yes");
      dialog.remove();
    });
  });
}

const help = $("#help");
const panel = $("#settings");

export function openHelp() {
  help.showModal();
}

const NUMBERS = ["temperature", "top_p", "max_tokens"];

function fill() {
  for (const name of NUMBERS) $(`[name=${name}]`, panel).value = settings[name] ?? "";
  $("[name=system]", panel).value = settings.system;
  $("[name=key]", panel).value = settings.key;
  $("[name=keepKey]", panel).checked = settings.keepKey;
  $("[name=reasoning]", panel).checked = settings.reasoning;
  for (const radio of panel.querySelectorAll("[name=theme]")) radio.checked = radio.value === settings.theme;
}

export function openSettings(focus) {
  fill();
  panel.showModal();
  if (focus) $(`[name=${focus}]`, panel).focus();
}

/** What the server does where a field is empty, and whether its model can leave out its reasoning. */
export function showDefaults(props) {
  const params = props?.default_generation_settings?.params ?? {};
  const known = (value) => (typeof value === "number" ? `${Number(value.toFixed(3))}` : "as the server does");
  $("[name=temperature]", panel).placeholder = known(params.temperature);
  $("[name=top_p]", panel).placeholder = known(params.top_p);
  const template = props?.chat_template ?? "";
  $("#no-switch").hidden = template.includes("enable_thinking") || !props;
}

panel.addEventListener("change", (event) => {
  const { name, type, value, checked } = event.target;
  if (!name) return;
  change({ [name]: type === "checkbox" ? checked : value });
  if (name === "key") document.dispatchEvent(new CustomEvent("key-changed"));
  if (name === "theme") document.dispatchEvent(new CustomEvent("theme-changed"));
  if (NUMBERS.includes(name)) event.target.value = settings[name] ?? "";
});

for (const dialog of [help, panel]) {
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close(); // beside it
  });
  $(".close", dialog).append(icon("close"));
  $(".close", dialog).addEventListener("click", () => dialog.close());
}
