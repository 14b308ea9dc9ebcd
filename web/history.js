// What this device remembers: ids, times and kinds. Photos, questions and results are about somebody's
// health, and the next one to hold the device may be somebody else; the host has them, for whoever has the
// id (a guest) or the key.

const HISTORY = "lesion.history";
const MOST = 50;
// Where localStorage is forbidden, for as long as the page is open.
let entries = [];

export function all() {
  try {
    entries = JSON.parse(localStorage.getItem(HISTORY)) ?? [];
  } catch { /* What is in memory. */ }
  return entries;
}

function write(next) {
  entries = next;
  try { localStorage.setItem(HISTORY, JSON.stringify(next)); } catch { /* In memory only. */ }
}

// `open` until it has ended: what a page that is opened anew goes on with.
export function add(id, kind) {
  if (has(id)) return;
  write([{ id, kind, at: new Date().toISOString(), open: true }, ...all()].slice(0, MOST));
}

export const has = (id) => all().some((entry) => entry.id === id);

export function ended(id) {
  if (all().some((entry) => entry.id === id && entry.open)) {
    write(all().map((entry) => (entry.id === id ? { ...entry, open: false } : entry)));
  }
}

let removed = () => {};
// Hears of every id that this tab removes.
export const onRemove = (listener) => { removed = listener; };

export function remove(id) {
  write(all().filter((entry) => entry.id !== id));
  removed(id);
}

// Rises with each `forget`: what was begun before is not to come back.
let forgotten = 0;
export const age = () => forgotten;

export function forget() {
  forgotten += 1;
  entries = [];
  try { localStorage.removeItem(HISTORY); } catch { /* There is nothing then. */ }
}

// Another tab of this browser has changed it.
export const onChange = (listener) => addEventListener("storage", (event) => {
  if (event.key === HISTORY || event.key === null) listener();
});
