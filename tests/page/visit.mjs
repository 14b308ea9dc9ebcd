// One person's visit: a browser of its own, phone-sized, what it sent and complained of, and how the page
// is looked at.
import assert from "node:assert/strict";
import { get } from "./steps.mjs";

const PHONE = { width: 360, height: 740 };
const NARROWEST = { width: 320, height: 640 };
// On a stage a function's turn that is lost is made up for by sweep, which looks once a minute.
const PATIENCE_MS = process.env.API_URL ? 90_000 : 30_000;

export class Visit {
  constructor(how) {
    Object.assign(this, how, { contexts: [], requests: [], violations: [] });
  }

  async context(options = {}) {
    const context = await this.browser.newContext({ viewport: PHONE, locale: "en-GB", ...options });
    this.contexts.push(context);
    context.on("request", (request) => this.requests.push(request));
    context.on("console", (message) => {
      if (/content security policy|trusted ?type|refused to/i.test(message.text())) this.violations.push(message.text());
    });
    context.on("weberror", (error) => this.violations.push(error.error().stack));
    return context;
  }

  // A page that is ready, with the key where the target wants one.
  async page(context, { url = this.target.url, key = this.target.key } = {}) {
    const page = await (context ?? (await this.context())).newPage();
    page.setDefaultTimeout(30_000);
    if (key) await page.addInitScript((value) => sessionStorage.setItem("lesion.key", value), key);
    await page.goto(url);
    await page.locator("html[data-ready]").waitFor();
    this.last = page;
    return page;
  }

  // A picture of the page, and what the target says of the jobs that it followed.
  async failed() {
    const ids = new Set(this.requests.map((request) => request.url().match(/\/result\/([0-9a-f-]{36})/)?.[1]).filter(Boolean));
    for (const id of ids) {
      const answer = await get(this, id).catch((error) => ({ status: error.message, text: () => "" }));
      console.log(`        ${id}: ${answer.status} ${(await answer.text()).slice(0, 200)}`);
    }
    if (!this.last || this.last.isClosed()) return;
    await this.last.screenshot({ path: this.screenshot("FAILED"), fullPage: true }).catch(() => {});
  }

  // What holds for every visit.
  check() {
    assert.deepEqual(this.violations, []);
    for (const request of this.requests) {
      const url = request.url();
      if (url.startsWith("blob:") || url.startsWith("data:")) continue;
      assert.ok(this.target.origins.includes(new URL(url).origin), `a third party: ${url}`);
      assert.ok(!/lesion_[0-9a-f]/.test(url), "a key in an address");
    }
  }

  // axe in light and dark, nothing beyond the edge of the narrowest phone, and a picture of each.
  async looks(page, what) {
    for (const colorScheme of ["light", "dark"]) {
      await page.emulateMedia({ colorScheme, reducedMotion: "reduce" });
      const { violations } = await page.evaluate(`${this.axe}; axe.run(document)`);
      const found = violations.map(({ id, nodes }) => `${id}: ${nodes.map(({ html, failureSummary }) => `${html} ${failureSummary}`).join("; ")}`);
      assert.deepEqual(found, [], `axe in ${colorScheme}`);
      await page.screenshot({ path: this.screenshot(`${what}-${colorScheme}`), fullPage: true });
    }
    await page.emulateMedia({ colorScheme: "light" });
    await page.setViewportSize(NARROWEST);
    const beyond = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
    assert.ok(beyond <= 0, `${beyond} pixels beyond the edge at ${NARROWEST.width}`);
    await page.setViewportSize(PHONE);
  }

  async close() {
    for (const context of this.contexts) await context.close();
  }
}

export const status = (page, tab = "photo") => page.locator(`#${tab}-status`);

// Until the element says that; Playwright's own expectations come with its test runner alone.
export async function says(locator, words) {
  const holds = (text) => (words instanceof RegExp ? words.test(text) : text.includes(words));
  const until = Date.now() + PATIENCE_MS;
  for (;;) {
    const text = await locator.innerText().catch(() => "");
    if (holds(text)) return text;
    if (Date.now() > until) assert.fail(`waited for ${words}, and it says: ${text}`);
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}
