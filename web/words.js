// The words of the pack's panels in the language of the page. English texts are their own keys.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const LOCALE = "Comfy.Locale";
let words = {};

/** Loads the words of the page's language, from locales/<language>/main.json. Until then all is English. */
export async function loadWords() {
  const language = app.ui?.settings?.getSettingValue?.(LOCALE) ?? "en";
  const response = await api.fetchApi("/i18n");
  words = response.ok ? ((await response.json())[language]?.sdxlLoRA ?? {}) : {};
}

/** The text in the page's language, with `values` in place of {name}. */
export function say(text, values = {}) {
  return (words[text] ?? text).replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole);
}

app.registerExtension({
  name: "sdxlloranodes.words",
  init: loadWords, // before any node is made
  setup() {
    app.ui?.settings?.addEventListener?.(`${LOCALE}.change`, loadWords); // for what is shown from then on
  },
});
