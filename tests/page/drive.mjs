// Drives the page in Debian's Chromium: `node drive.mjs` with PAGE_MODULES (playwright-core and axe-core) and
// SCREENSHOTS. Against hosts of the debug build, or, where API_URL is set (scripts/emulator), against that stage.
import { mkdirSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import { Visit } from "./visit.mjs";
import * as results from "./results.mjs";
import { host, model, pages } from "./serve.mjs";
import * as troubles from "./troubles.mjs";

const require = createRequire(`${process.env.PAGE_MODULES}/`);
const { chromium } = require("playwright-core");
const { source: axe } = require("axe-core");
const screenshots = process.env.SCREENSHOTS;
mkdirSync(screenshots, { recursive: true });

const LAN_NAME = "lesion.test";
const stops = [];
const started = async (promise) => {
  const it = await promise;
  stops.unshift(it.stop);
  return it;
};

async function embedded() {
  const llm = await started(model(0));
  const open = await started(host({ LLM_BASE_URL: llm.url, LLM_MODEL: "stand-in", SWEEP_INTERVAL_SECONDS: "1" }));
  // Under a name that is not loopback's: over plain HTTP a browser gives such a page less.
  const [keyed, guests] = await Promise.all([{}, { ADMIT_GUESTS: "true", LLM_BASE_URL: llm.url, LLM_MODEL: "stand-in" }].map(
    async (settings) => {
      const { url, key } = await started(host(settings, { keyed: true }));
      return { url: url.replace("127.0.0.1", LAN_NAME), api: url, key };
    }));
  return { name: "embedded", url: open.url, api: open.url, key: null, gate: llm.gate, host: open, keyed, guests,
    origins: [open.url, keyed.url, guests.url] };
}

async function stage() {
  const { API_URL: api, AWS_ENDPOINT_URL: endpoint, LESION_API_KEY: key, LLM_ADDRESS: address, PAGE_PORT: port } = process.env;
  const llm = await started(model(Number(address.split(":")[1])));
  // As the stage says them: the API's host, that of its WebSockets, and the bucket's.
  const hosts = [new URL(api).origin, endpoint, endpoint.replace("127.0.0.1", "localhost")];
  const sockets = hosts.map((url) => url.replace("http", "ws"));
  const page = await started(pages(api, { port: Number(port), connect: [...hosts, ...sockets], images: hosts }));
  return { name: "stage", url: page.url, api, key, gate: llm.gate, origins: [page.url, ...hosts] };
}

const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  // Its sandbox is not for root; nothing but this page is opened.
  args: [`--host-resolver-rules=MAP ${LAN_NAME} 127.0.0.1`, ...(process.getuid() === 0 ? ["--no-sandbox"] : [])],
});
stops.unshift(() => browser.close());
let failed = 0;
try {
  const target = await (process.env.API_URL ? stage() : embedded());
  const wanted = process.argv.slice(2);
  for (const [name, scenario] of Object.entries({ ...results, ...troubles })) {
    if (wanted.length ? !wanted.includes(name) : scenario.only && scenario.only !== target.name) continue;
    const visit = new Visit({ browser, target, axe, screenshot: (what) => join(screenshots, `${target.name}-${name}-${what}.png`) });
    const from = performance.now();
    try {
      await scenario(visit);
      visit.check();
      console.log(`ok      ${name} (${((performance.now() - from) / 1000).toFixed(1)} s)`);
    } catch (error) {
      failed += 1;
      console.log(`FAILED  ${name}\n${error.stack}`);
      await visit.failed();
    } finally {
      await visit.close();
      target.gate.release();
    }
  }
} finally {
  for (const stop of stops) await stop();
}
console.log(failed ? `${failed} scenarios failed` : "every scenario passed");
console.log(`screenshots are in ${screenshots}`);
process.exit(failed ? 1 : 0);
