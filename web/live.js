// Follows jobs until they end: over a WebSocket, and by long poll for as long as there is none.
import { ApiError, onKey, pause, random, request, resolve } from "./api.js";

const POLL_SECONDS = 25;
// After so long without a word the job is asked for: frames may be lost.
const SILENCE_MS = 60_000;
const ACCEPT_MS = 15_000;
const OPEN_MS = 5_000;
// A connection that has lived so long was none of a row that fails.
const LIVED_MS = 10_000;
const PAUSES_MS = [1_000, 2_000, 5_000, 15_000, 30_000];

// What is followed: id → { seq, etag, claim, text, told, poll, refusals, again }. `poll` runs while the host
// does not tell of it: there is no socket, or it has refused to, until `again`.
const jobs = new Map();
// Questions that were sent and not yet accepted: tag → { resolve, reject }.
const asked = new Map();
// Who hears: status(id, status, result), ended(id, result), text(id, text), deleted(id), unknown(id),
// refused(id, error), connection(state).
let heard = {};
let socket = null;
let opening = null;
// Of the key: a connection that another one has opened is not used.
let generation = 0;
let failures = 0;
let state = "";

export function listen(listeners) {
  heard = listeners;
  addEventListener("online", () => { failures = 0; if (jobs.size) connect(); });
  addEventListener("offline", () => {
    const last = socket;
    last?.close();
    if (last) lost(last);
    tell();
  });
  onKey(startAnew);
  setInterval(watch, 5_000);
}

// Another key is another caller: who connected before is not asked in its name, nor told of its jobs.
function startAnew() {
  generation += 1;
  const last = socket;
  socket = opening = null;
  last?.close();
  for (const { reject } of asked.values()) reject(new ApiError("unauthorized", 401));
  for (const [id, job] of jobs) {
    job.poll?.abort();
    job.etag = null;
    poll(id);
  }
  if (jobs.size) connect();
  tell();
}

export function follow(id) {
  if (jobs.has(id)) return;
  begin(id);
  if (isOpen()) subscribe(id);
  else { connect(); poll(id); }
  tell();
}

export function unfollow(id) {
  jobs.get(id)?.poll?.abort();
  jobs.delete(id);
}

// Makes a prompt job over the socket, where its answer comes as it is written. Gives the id, or null where
// there is no socket or it fell silent: then the same question may be submitted under the same idempotency key.
export async function ask(fields) {
  await connect();
  if (!isOpen()) return null;
  const tag = random();
  const accepted = new Promise((resolve, reject) => asked.set(tag, { resolve, reject }));
  socket.send(JSON.stringify({ action: "ask", tag, ...fields }));
  const timer = setTimeout(() => asked.get(tag)?.resolve(null), ACCEPT_MS);
  try {
    return await accepted;
  } finally {
    clearTimeout(timer);
    asked.delete(tag);
  }
}

const begin = (id) => jobs.set(id, { seq: -1, etag: null, claim: 0, text: "", told: Date.now(), poll: null, refusals: 0, again: 0 });
const isOpen = () => socket?.readyState === WebSocket.OPEN;
const subscribe = (id) => socket.send(JSON.stringify({ action: "subscribe", request_id: id }));
const isPolled = (job) => job.poll !== null && !job.poll.signal.aborted;
const paused = (times) => PAUSES_MS[Math.min(times, PAUSES_MS.length - 1)];

function tell() {
  const isLive = isOpen() && ![...jobs.values()].some(isPolled);
  const now = isLive ? "live" : navigator.onLine ? "polling" : "offline";
  if (now !== state) heard.connection(state = now);
}

// Gives up quietly: long polls go on, and `watch` tries again.
function connect() {
  if (isOpen() || !navigator.onLine) return Promise.resolve();
  const mine = opening ??= dial(generation).catch(() => { failures += 1; }).finally(() => {
    if (opening === mine) opening = null;
    tell();
  });
  return mine;
}

async function dial(age) {
  const { json } = await request("POST", "/socket-tickets", { timeoutMs: OPEN_MS });
  const url = new URL(resolve(json.url));
  url.protocol = url.protocol.replace("http", "ws");
  const next = new WebSocket(url);
  await new Promise((opened, failed) => {
    const timer = setTimeout(() => { next.close(); failed(new Error("silent")); }, OPEN_MS);
    next.onopen = () => { clearTimeout(timer); opened(); };
    next.onclose = () => { clearTimeout(timer); failed(new Error("closed")); };
  });
  if (age !== generation) {
    next.close();
    throw new Error("another caller");
  }
  socket = next;
  const alive = setTimeout(() => { failures = 0; }, LIVED_MS);
  next.onmessage = (message) => receive(JSON.parse(message.data));
  next.onclose = () => { clearTimeout(alive); lost(next); };
  for (const [id, job] of jobs) {
    job.poll?.abort();
    job.told = Date.now();
    subscribe(id);
  }
}

function lost(which) {
  if (which !== socket) return;
  socket = null;
  for (const { resolve } of asked.values()) resolve(null);
  for (const id of jobs.keys()) poll(id);
  // `watch` tries again: what opens and closes at once must not be dialled without a pause.
  nextTry = Date.now() + paused(failures);
  failures += 1;
  tell();
}

let nextTry = 0;
function watch() {
  if (!jobs.size) return;
  if (isOpen()) {
    for (const [id, job] of jobs) {
      if (isPolled(job)) {
        if (Date.now() > job.again) { job.again = Date.now() + paused(job.refusals); subscribe(id); }
      } else if (Date.now() - job.told >= SILENCE_MS) { job.told = Date.now(); see(id, job); }
    }
  } else if (Date.now() > nextTry) {
    nextTry = Date.now() + paused(failures);
    connect();
  }
  tell();
}

function receive(frame) {
  const job = jobs.get(frame.request_id);
  if (job) job.told = Date.now();
  const waiting = asked.get(frame.tag);
  if (frame.type === "accepted") {
    if (!job) begin(frame.request_id);
    waiting?.resolve(frame.request_id);
  } else if (frame.type === "error") {
    waiting?.reject(frame);
    if (job) refused(frame.request_id, job);
  } else if (frame.type === "text" && job) {
    write(job, frame);
  } else if (job && frame.seq >= job.seq) {
    // It is told of.
    job.refusals = 0;
    job.poll?.abort();
    tell();
    if (frame.seq === job.seq) return;
    job.seq = frame.seq;
    if (frame.type === "status") heard.status(frame.request_id, frame.status);
    if (frame.type === "deleted") { unfollow(frame.request_id); heard.deleted(frame.request_id); }
    // What the model says is there before the description, and the link to a map in what GET answers alone.
    if (frame.type.startsWith("result") || frame.status === "awaiting_description") see(frame.request_id, job);
  }
}

// Too many, no key any more, or not there: HTTP says which. What may pass is asked for until it has passed.
function refused(id, job) {
  job.again = Date.now() + paused(job.refusals);
  job.refusals += 1;
  poll(id);
  tell();
}

// docs/API.md, "Text": the highest claim counts, and `offset` says where the piece belongs.
function write(job, { request_id: id, claim, offset, text }) {
  if (claim < job.claim) return;
  if (claim > job.claim) Object.assign(job, { claim, text: "" });
  if (offset > job.text.length) return;
  job.text = job.text.slice(0, offset) + text;
  heard.text(id, job.text);
}

// Reads a job once. Whether it is worth asking again.
async function look(id, wait = 0, signal = undefined) {
  const job = jobs.get(id);
  const headers = job?.etag && wait ? { "if-none-match": job.etag } : {};
  const timeoutMs = (wait + 10) * 1000;
  try {
    const path = `/result/${encodeURIComponent(id)}${wait ? `?wait=${wait}` : ""}`;
    const answer = await request("GET", path, { headers, signal, timeoutMs });
    if (!jobs.has(id) || answer.status === 304) return true;
    job.etag = answer.headers.get("etag");
    if (["completed", "needs_retake", "failed"].includes(answer.json.status)) {
      unfollow(id);
      heard.ended(id, answer.json);
      return false;
    }
    heard.status(id, answer.json.status, answer.json);
    return true;
  } catch (error) {
    if (!jobs.has(id) || signal?.aborted) return false;
    if (error.passes) throw error;
    unfollow(id);
    if (error.status === 404) heard.unknown(id);
    else heard.refused(id, error);
    return false;
  }
}

// Reads a job that the socket tells of. What fails for the moment `watch` does again: no frame will say it twice.
function see(id, job) {
  look(id).catch(() => { job.told = Date.now() - SILENCE_MS; tell(); });
}

async function poll(id) {
  const job = jobs.get(id);
  if (!job || (job.poll && !job.poll.signal.aborted)) return;
  const poll = job.poll = new AbortController();
  for (let tries = 0; jobs.get(id) === job && !poll.signal.aborted; ) {
    try {
      // At once for how it stands; from then on, with its tag, for the next step.
      if (!(await look(id, job.etag ? POLL_SECONDS : 0, poll.signal))) break;
      tries = 0;
      if (!job.etag) await pause(1_000);
    } catch (error) {
      tell();
      await pause(Math.max(error.retryAfter * 1000, PAUSES_MS[Math.min(tries++, 2)]));
    }
  }
}
