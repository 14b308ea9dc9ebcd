// One job as it stands: its state, what came of it, and its deletion. Words of the host are shown as they
// are, or in the page's language where the page knows them.
import { erase, resolve } from "./api.js";
import { confirm, el, say } from "./dom.js";
import * as history from "./history.js";
import * as live from "./live.js";
import { has, language, percent, t, translated, when } from "./text.js";

export class View {
  // `status` says how the job stands, `box` shows what came of it, `heading` is where to go on after a deletion.
  constructor({ kind, status, box, heading, onCleared }) {
    Object.assign(this, { kind, status, box, heading, onCleared, id: null, words: () => "" });
    this.body = el("div");
    this.connection = el("p", { class: "note" });
    this.erase = el("button", { type: "button", onclick: () => this.delete() });
    this.buttons = el("div", { class: "buttons" }, this.erase);
    box.append(this.connection, this.body, this.buttons);
    this.mapBox = el("input", { type: "checkbox", checked: true, onchange: () => this.lay() });
    this.clear();
  }

  // `words` is a function, to be asked again in another language.
  say(words) {
    this.words = words;
    say(this.status, words());
  }

  clear() {
    if (this.id) live.unfollow(this.id);
    Object.assign(this, { id: null, result: null, text: null, question: null, photo: null, overlay: null });
    this.box.hidden = true;
    this.onCleared?.();
    this.say(() => "");
  }

  // Shows a job from now on. `photo` is the address of the photo where this page has it.
  show(id, { photo = null, question = null, words = () => t("history.opening") } = {}) {
    this.clear();
    Object.assign(this, { id, photo, question });
    this.box.hidden = false;
    this.say(words);
    this.render();
    live.follow(id);
  }

  stands(status, result = null) {
    this.result = result ?? this.result;
    const isAnswer = this.kind === "prompt" && status === "awaiting_description";
    this.say(() => t(isAnswer ? "answering" : `status.${status}`));
    this.render();
  }

  ended(result) {
    history.ended(this.id);
    this.connection.textContent = "";
    this.stands(result.status, result);
  }

  write(text) {
    this.text = text;
    this.render();
  }

  // Not to be shown any more, for the reason in `words`.
  end(words) {
    const hadFocus = this.box.contains(document.activeElement);
    this.clear();
    this.say(words);
    if (hadFocus || document.activeElement === document.body) this.heading.focus();
  }

  async delete() {
    const id = this.id;
    if (!(await confirm(t("delete.question"), t("delete.yes")))) return;
    this.say(() => t("delete.working"));
    const words = await deleteEverywhere(id);
    if (history.has(id)) this.say(words);
    else if (this.id === id) this.end(words);
    this.heading.focus();
  }

  render() {
    say(this.status, this.words());
    this.erase.textContent = t("delete");
    if (!this.id) return;
    const focused = this.box.contains(document.activeElement) ? document.activeElement : null;
    this.body.replaceChildren(...(this.kind === "photo" ? this.photoParts() : this.promptParts()));
    focused?.focus();
  }

  photoParts() {
    const { result } = this;
    if (!result) return [];
    const parts = [];
    if (result.status === "needs_retake") parts.push(...retake(result));
    if (result.status === "failed") parts.push(...failure(result));
    if (result.abstained) parts.push(...abstention(result));
    if (result.predictions.length) {
      parts.push(...predictions(result), ...this.map(), ...description(result));
    }
    return [...parts, disclaimer(result), sent(result)];
  }

  promptParts() {
    const { result } = this;
    const answer = result?.content ?? this.text;
    const parts = [];
    if (this.question) parts.push(el("h3", {}, t("ask.question")), el("p", { class: "text" }, this.question));
    if (answer !== null && answer !== undefined) parts.push(el("h3", {}, t("ask.answer")), el("p", { class: "text", id: "answer" }, answer));
    if (result?.finish_reason === "length") parts.push(el("p", { class: "note" }, t("ask.cut")));
    if (result?.status === "failed") parts.push(...failure(result));
    if (result) parts.push(disclaimer(result), sent(result));
    return parts;
  }

  map() {
    const { map } = this.result;
    if (!map) return [];
    const heading = el("h3", {}, t("map.heading"));
    const note = said("map.note", map.note, "note");
    if (!this.photo) return [heading, el("p", { class: "note" }, t("map.gone")), note];
    // Each answer has a new link; the first will do.
    this.overlay ??= el("img", { src: resolve(map.url), class: "overlay", onerror: () => this.overlay.remove() });
    this.overlay.alt = t("map.overlay");
    this.lay();
    const photo = el("img", { src: this.photo, class: "photo", alt: t("map.photo") });
    return [heading, el("figure", {},
      el("div", { class: "stack" }, photo, this.overlay),
      el("label", { class: "check" }, this.mapBox, t("map.show")),
      el("figcaption", {}, note))];
  }

  lay() {
    if (this.overlay) this.overlay.hidden = !this.mapBox.checked;
  }
}

// Erases a job on the host and then here, and gives the words for what came of it.
export async function deleteEverywhere(id) {
  try {
    await erase(id);
  } catch (error) {
    if (error.status !== 404) return () => error.words;
    // Deleted or expired; or another's, and then its id is all that leads back to it.
    if (!(await confirm(t("delete.unknown.question"), t("delete.unknown.yes")))) return () => t("history.unknown");
    history.remove(id);
    return () => t("delete.unknown.done");
  }
  history.remove(id);
  return () => t("delete.done");
}

// A paragraph of the host's.
function said(key, words, name) {
  const { text, lang } = translated(key, words);
  return el("p", { class: name, lang }, text);
}

const disclaimer = (result) => said("disclaimer", result.disclaimer, "disclaimer");

const sent = (result) => el("p", { class: "note" }, t("result.times", { at: when(result.created_at) }));

function retake(result) {
  const reasons = result.quality.reasons.map((reason) => el("li", {}, t(has(`reason.${reason}`) ? `reason.${reason}` : reason)));
  return [el("h3", {}, t("retake.heading")), el("ul", { class: "reasons" }, reasons), el("p", {}, t("retake.text"))];
}

function failure({ error }) {
  const key = `failure.${error.code}`;
  const words = has(key) ? el("p", {}, t(key)) : el("p", { lang: "en" }, error.message);
  return [el("h3", {}, t("failure.heading")), words];
}

function abstention({ abstained }) {
  const key = `abstained.${abstained.reason}`;
  return [
    el("h3", {}, t("abstained.heading")),
    has(key) ? el("p", {}, t(key)) : null,
    el("p", {}, t("abstained.text")),
  ].filter(Boolean);
}

// Every class with its name and number; nothing is said of those that are not counted as malignant.
function predictions({ predictions }) {
  const rows = predictions.map(({ name, probability, malignant }) => {
    const fill = el("div", { class: malignant ? "fill counted" : "fill" });
    fill.style.width = `${100 * probability}%`;
    const words = translated(`class.${name}`, name);
    return el("li", {},
      el("span", { class: "name", lang: words.lang }, words.text), " ",
      el("span", { class: "number" }, percent(probability)), " ",
      malignant ? el("span", { class: "note" }, t("result.counted")) : null,
      el("div", { class: "bar", "aria-hidden": "true" }, fill));
  });
  return [
    el("h3", {}, t("result.heading")),
    el("p", { class: "note" }, t("result.probabilities")),
    el("ol", { class: "bars" }, rows),
  ];
}

function description({ description, disclaimer }) {
  if (!description) return [];
  // It ends with the disclaimer, which stands below anyway.
  const text = description.text.replace(disclaimer, "").trim();
  return [
    el("h3", {}, t("result.description")),
    el("p", { lang: "en" }, text),
    el("p", { class: "note" },
      [t(`result.by.${description.source}`), description.fallback ? t("result.fallback") : "", language === "en" ? "" : t("result.english")].join(" ").trim()),
  ];
}
