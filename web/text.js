// The page's words: one file a language.

const LANGUAGES = ["en", "de"];
const CHOSEN = "lesion.language";
const listeners = [];
let words = {};
let english = {};
export let language = "en";

const read = async (name) => (await fetch(`${name}.json`)).json();

// The language chosen before, or else the first of the browser's that there is.
export async function open() {
  english = await read("en");
  const wanted = [stored(), ...navigator.languages.map((tag) => tag.slice(0, 2))];
  await choose(wanted.find((name) => LANGUAGES.includes(name)) ?? "en");
}

function stored() {
  try { return localStorage.getItem(CHOSEN); } catch { return null; }
}

export function remember(name) {
  try { localStorage.setItem(CHOSEN, name); } catch { /* Then for this visit only. */ }
}

export async function choose(name) {
  words = name === "en" ? english : await read(name);
  language = name;
  document.documentElement.lang = name;
  document.title = t("title");
  for (const element of document.querySelectorAll("[data-text]")) element.textContent = t(element.dataset.text);
  for (const element of document.querySelectorAll("[data-label]")) element.setAttribute("aria-label", t(element.dataset.label));
  for (const element of document.querySelectorAll("[data-alt]")) element.alt = t(element.dataset.alt);
  for (const listener of listeners) listener();
}

export const onLanguage = (listener) => listeners.push(listener);

// The words under a key, with what stands in {braces} put in.
export function t(key, values = {}) {
  return (words[key] ?? key).replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole);
}

export const has = (key) => key in words;

// The host's own words, which are English: translated where they are those that the page knows by this key,
// as they are otherwise. Nothing that the host says is ever left out.
export const translated = (key, said) => (english[key] === said ? { text: t(key), lang: language } : { text: said, lang: "en" });

// The browser's own kind of this language, such as en-GB: dates differ.
const locale = () => navigator.languages.find((tag) => tag.startsWith(language)) ?? language;

// Never a rounded 0 or 100: the model is sure of nothing.
export function percent(share) {
  const { format } = new Intl.NumberFormat(locale(), { style: "percent", minimumFractionDigits: 1, maximumFractionDigits: 1 });
  if (share < 0.001) return `< ${format(0.001)}`;
  return share > 0.999 ? `> ${format(0.999)}` : format(share);
}

export const when = (time) => new Intl.DateTimeFormat(locale(), { dateStyle: "medium", timeStyle: "short" }).format(new Date(time));
