// What the page is tested against: a model server that writes when it is told to, a host of the debug
// build, and for a stage on AWS a static host that serves `web/` with its headers.
import { spawn } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { createServer } from "node:http";
import { tmpdir } from "node:os";
import { join } from "node:path";

const ROOT = join(import.meta.dirname, "../..");
const TYPES = { html: "text/html; charset=utf-8", css: "text/css; charset=utf-8", js: "text/javascript; charset=utf-8", json: "application/json", svg: "image/svg+xml" };

const listening = (server, port = 0) => new Promise((resolve) => server.listen(port, "127.0.0.1", () => resolve(server.address().port)));

export const WORDS = ["A naevus ", "is a growth ", "of pigment cells, ", "é and 🩺."];

// An OpenAI-compatible server: two words, then nothing until `release` is called, then the rest.
export async function model(port) {
  let waiting = [];
  const gate = { closed: false, release: () => { gate.closed = false; waiting.splice(0).forEach((go) => go()); } };
  const server = createServer(async (request, response) => {
    let body = "";
    for await (const part of request) body += part;
    const asked = JSON.parse(body);
    const passed = () => (gate.closed ? new Promise((go) => waiting.push(go)) : null);
    const chunk = (delta, finish_reason = null) => ({ id: "c", object: "chat.completion.chunk", model: asked.model, choices: [{ index: 0, delta, finish_reason }] });
    response.writeHead(200, { "content-type": "text/event-stream" });
    const write = (event) => response.write(`data: ${JSON.stringify(event)}\n\n`);
    for (const [at, content] of WORDS.entries()) {
      if (at === 2) await passed();
      write(chunk({ content }));
    }
    write(chunk({}, "stop"));
    write({ ...chunk({}), choices: [], usage: { prompt_tokens: 5, completion_tokens: 9 } });
    response.end("data: [DONE]\n\n");
  });
  const bound = await listening(server, port);
  return { gate, url: `http://127.0.0.1:${bound}/v1`, stop: () => { server.close(); server.closeAllConnections(); } };
}

// Whatever ends this process ends what it has started.
const children = [];
process.on("exit", () => children.forEach((child) => child.kill()));

// A host of its own folder. `keyed`: with the first admin's key.
export async function host(environment, { keyed = false } = {}) {
  const folder = mkdtempSync(join(tmpdir(), "lesion-page-"));
  const env = { PATH: process.env.PATH, ORT_DYLIB_PATH: process.env.ORT_DYLIB_PATH, ORT_DISABLE_TELEMETRY: "1", TMPDIR: folder,
    DATA_DIR: join(folder, "data"), LISTEN_ADDR: "127.0.0.1:0", MODEL_DIR: join(ROOT, "model"), LOG_LEVEL: "warn", ...environment };
  const run = (...words) => {
    const child = spawn(join(ROOT, "target/debug/local"), words, { env, stdio: ["ignore", "pipe", "inherit"] });
    children.push(child);
    return child;
  };
  const key = keyed ? (await printed(run("init"), /^(lesion_\S+)/m))[1] : null;
  let child, ended;
  const start = async () => {
    child = run("serve");
    ended = new Promise((resolve) => child.once("exit", resolve));
    const [, url] = await printed(child, /^listening on (\S+)/m);
    // Where it is found again.
    env.LISTEN_ADDR = new URL(url).host;
    return url;
  };
  const end = async (signal) => { child.kill(signal); await ended; };
  const url = await start();
  return { url, key, start, kill: () => end("SIGKILL"), stop: async () => { await end("SIGTERM"); rmSync(folder, { recursive: true, force: true }); } };
}

function printed(child, pattern) {
  return new Promise((resolve, reject) => {
    let text = "";
    child.stdout.on("data", (part) => {
      text += part;
      const found = text.match(pattern);
      if (found) resolve(found);
    });
    // It may have ended before what it printed was read.
    child.once("close", () => reject(new Error(`ended without ${pattern}: ${text}`)));
  });
}

// `web/` as a static host serves it for an API that lies elsewhere.
export async function pages(api, { port, connect = [], images = [] }) {
  const headers = JSON.parse(readFileSync(join(ROOT, "web/headers.json")));
  const policy = headers["content-security-policy"]
    .replace("connect-src 'self'", ["connect-src 'self'", ...connect].join(" "))
    .replace("img-src 'self'", ["img-src 'self'", ...images].join(" "));
  const config = { ...JSON.parse(readFileSync(join(ROOT, "web/config.json"))), api };
  const server = createServer((request, response) => {
    const name = request.url === "/" ? "index.html" : request.url.slice(1);
    try {
      const body = name === "config.json" ? JSON.stringify(config) : readFileSync(join(ROOT, "web", name));
      response.writeHead(200, { ...headers, "content-security-policy": policy, "content-type": TYPES[name.split(".").at(-1)] }).end(body);
    } catch {
      response.writeHead(404).end();
    }
  });
  const bound = await listening(server, port);
  return { url: `http://127.0.0.1:${bound}`, stop: () => { server.close(); server.closeAllConnections(); } };
}
