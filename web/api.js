// The HTTP API: where it is, the key, and what went wrong.
import { has, t } from "./text.js";

const KEY = "lesion.key";
const TIMEOUT_MS = 60_000;
const listeners = [];
let config = { api: "" };
// Where sessionStorage is forbidden, for as long as the page is open.
let key = null;

export class ApiError extends Error {
  // `code` is the API's, or "network" where nothing came back.
  constructor(code, status = 0, { message = "", request_id: id = "" } = {}, retryAfter = 0) {
    super(code);
    Object.assign(this, { code, status, said: message, id, retryAfter });
  }

  get words() {
    const name = `error.${this.code}`;
    return t(has(name) ? name : "error.other", { message: this.said, code: this.code, id: this.id, seconds: this.retryAfter || 5 });
  }

  // Whether the same request may do later.
  get passes() {
    return this.code === "network" || this.code === "unavailable" || this.status === 429;
  }
}

export async function open() {
  config = await (await fetch("config.json")).json();
  try { key = sessionStorage.getItem(KEY); } catch { key = null; }
  return config;
}

// Of this tab alone and gone with it: what localStorage holds, the next one to use the device finds.
export function setKey(value) {
  const before = key;
  key = value || null;
  try {
    if (key) sessionStorage.setItem(KEY, key);
    else sessionStorage.removeItem(KEY);
  } catch { /* Then until the page is closed. */ }
  if (key !== before) changed();
}

let changed = () => {};
// Hears that requests are another caller's from now on.
export const onKey = (listener) => { changed = listener; };

export const hasKey = () => key !== null;

// Hears of every 401.
export const onUnauthorized = (listener) => listeners.push(listener);

// An address that the API has answered: absolute, or of the API's own.
export const resolve = (url) => (url.startsWith("/") ? new URL(config.api + url, location.href).href : url);

// Asks the API. Gives the status, the headers and the JSON, and throws ApiError.
export async function request(method, path, { body, headers = {}, signal, timeoutMs = TIMEOUT_MS } = {}) {
  const all = { ...headers, ...(key && { authorization: `Bearer ${key}` }) };
  const ending = new AbortController();
  const end = () => ending.abort();
  const timer = setTimeout(end, timeoutMs);
  signal?.addEventListener("abort", end);
  let response, json;
  try {
    response = await fetch(config.api + path, {
      method, body, headers: all, signal: ending.signal, credentials: "omit", cache: "no-store", redirect: "error",
    });
    const text = await response.text();
    // What stands between may answer in words of its own.
    try { json = text ? JSON.parse(text) : null; } catch { json = null; }
  } catch {
    throw new ApiError("network");
  } finally {
    clearTimeout(timer);
    signal?.removeEventListener("abort", end);
  }
  if (response.ok || response.status === 304) {
    if (json === null && response.status === 200) throw new ApiError("unavailable", response.status);
    return { status: response.status, headers: response.headers, json };
  }
  const retryAfter = Number(response.headers.get("retry-after")) || 0;
  const unsaid = response.status === 429 || response.status >= 500 ? "unavailable" : "unknown";
  const failure = new ApiError(json?.error?.code ?? unsaid, response.status, json?.error, retryAfter);
  if (response.status === 401) for (const listener of listeners) listener();
  throw failure;
}

// For tags and idempotency keys. randomUUID is missing where a page comes over plain HTTP.
export const random = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");

export async function submit(body, contentType, idempotencyKey) {
  const headers = { "content-type": contentType, "idempotency-key": idempotencyKey };
  return (await request("POST", "/submit", { body, headers })).json.request_id;
}

// So many milliseconds, or until there is a connection again.
export const pause = (ms) => new Promise((resolve) => {
  const done = () => { clearTimeout(timer); removeEventListener("online", done); resolve(); };
  const timer = setTimeout(done, ms);
  addEventListener("online", done);
});

export const erase = (id) => request("DELETE", `/result/${encodeURIComponent(id)}`);
