// Puts the page together: words, tabs, key, history, and who is told what.
import * as api from "./api.js";
import * as ask from "./ask.js";
import { $, confirm, el, say } from "./dom.js";
import * as history from "./history.js";
import * as live from "./live.js";
import * as photo from "./photo.js";
import { deleteEverywhere } from "./result.js";
import * as text from "./text.js";

const { t } = text;
const TABS = ["photo", "ask", "history"];
let connection = "";
let trouble = () => "";
let historyWords = () => "";

function select(name) {
  for (const tab of TABS) {
    const button = $(`tab-${tab}`);
    button.setAttribute("aria-selected", String(tab === name));
    button.tabIndex = tab === name ? 0 : -1;
    $(tab).hidden = tab !== name;
  }
  complain(() => "");
  if (name === "history") tellHistory(() => "");
}

function openTabs() {
  for (const tab of TABS) $(`tab-${tab}`).addEventListener("click", () => select(tab));
  $("tabs").addEventListener("keydown", (event) => {
    const at = TABS.findIndex((tab) => event.target === $(`tab-${tab}`));
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: TABS.length - 1 }[event.key];
    if (at < 0 || to === undefined) return;
    event.preventDefault();
    const tab = TABS[(to + TABS.length) % TABS.length];
    select(tab);
    $(`tab-${tab}`).focus();
  });
}

function complain(words) {
  trouble = words;
  say($("trouble"), words());
}

function openAccess() {
  const reveal = () => { $("access").hidden = false; $("key").focus(); };
  $("key-open").addEventListener("click", reveal);
  api.onUnauthorized(() => {
    const key = api.hasKey() ? "access.refused" : "access.wanted";
    complain(() => t(key));
    reveal();
  });
  $("access-form").addEventListener("submit", (event) => {
    event.preventDefault();
    api.setKey($("key").value.trim());
    closeAccess("access.taken");
  });
  $("key-forget").addEventListener("click", () => {
    api.setKey(null);
    closeAccess("access.forgotten");
  });
}

function closeAccess(key) {
  $("key").value = "";
  $("access").hidden = true;
  complain(() => t(key));
  TABS.map((tab) => $(`tab-${tab}`)).find((button) => button.tabIndex === 0).focus();
}

const of = (kind) => (kind === "photo" ? photo : ask);

function tellHistory(words) {
  historyWords = words;
  showHistory();
}

function showHistory() {
  const entries = history.all();
  say($("history-status"), historyWords() || (entries.length ? "" : t("history.none")));
  $("forget").hidden = entries.length === 0;
  $("entries").replaceChildren(...entries.map(({ id, kind, at }, number) => {
    const row = `entry-${number}`;
    const button = (key, onclick) => el("button", { type: "button", onclick, "aria-describedby": row }, t(key));
    return el("li", {},
      el("span", { id: row }, t("history.row", { kind: t(kind === "photo" ? "history.photo" : "history.question"), at: text.when(at) })),
      el("div", { class: "buttons" },
        button("history.open", () => openEntry(id, kind)),
        button("delete", () => deleteEntry(id))));
  }));
}

function openEntry(id, kind) {
  select(kind === "photo" ? "photo" : "ask");
  of(kind).show(id);
  of(kind).view.heading.focus();
}

async function deleteEntry(id) {
  if (!(await confirm(t("delete.question"), t("delete.yes")))) return;
  tellHistory(() => t("delete.working"));
  const words = await deleteEverywhere(id);
  if (!history.has(id)) dropShown(id, () => t("delete.elsewhere"));
  tellHistory(words);
  $("history-heading").focus();
}

function dropShown(id, words) {
  for (const { view } of [photo, ask]) if (view.id === id) view.end(words);
}

function openHistory() {
  $("forget").addEventListener("click", async () => {
    if (!(await confirm(t("history.forget.question"), t("history.forget.yes")))) return;
    history.forget();
    photo.forget();
    ask.forget();
    api.setKey(null);
    tellHistory(() => t("history.forgotten"));
    $("history-heading").focus();
  });
  history.onRemove(photo.drop);
  history.onChange(() => {
    const kept = history.all().map(({ id }) => id);
    photo.keep(kept);
    for (const { view } of [photo, ask]) if (view.id && !kept.includes(view.id)) view.end(() => t("delete.elsewhere"));
    showHistory();
  });
}

const shown = (id) => [photo.view, ask.view].find((view) => view.id === id);

function showConnection() {
  for (const view of [photo.view, ask.view]) {
    const isOpen = view.id && !["completed", "needs_retake", "failed"].includes(view.result?.status);
    say(view.connection, isOpen && connection ? t(`connection.${connection}`) : "");
  }
}

function listen() {
  live.listen({
    status: (id, status, result) => { shown(id)?.stands(status, result); showConnection(); },
    ended: (id, result) => { shown(id)?.ended(result); history.ended(id); },
    text: (id, words) => shown(id)?.write(words),
    deleted: (id) => { history.remove(id); dropShown(id, () => t("delete.elsewhere")); showHistory(); },
    unknown: (id) => { history.ended(id); dropShown(id, () => t("history.unknown")); },
    refused: (id, error) => dropShown(id, () => error.words),
    connection: (state) => { connection = state; showConnection(); },
  });
}

function render() {
  say($("trouble"), trouble());
  photo.render();
  ask.render();
  showHistory();
  showConnection();
}

await text.open();
const config = await api.open();
photo.open(config);
ask.open();
openTabs();
openAccess();
openHistory();
listen();
$("language").value = text.language;
$("language").addEventListener("change", async () => {
  text.remember($("language").value);
  await text.choose($("language").value);
});
text.onLanguage(render);
render();
// What was under way when the page was last left.
for (const kind of ["prompt", "photo"]) {
  const entry = history.all().find((entry) => entry.kind === kind && entry.open);
  if (entry) of(kind).show(entry.id);
}
document.documentElement.dataset.ready = "";
