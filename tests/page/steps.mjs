// What several scenarios do and look at.
import { join } from "node:path";

const ROOT = join(import.meta.dirname, "../..");
export const sample = (name) => join(ROOT, "model/samples", `${name}.png`);
export const DISCLAIMER = "Research demonstration, not a medical device";

export async function choose(page, file) {
  await page.locator("#file").setInputFiles(file);
  await page.locator("#check:not([hidden]), #photo-status:has-text('cannot open')").waitFor();
}

// Sends what is chosen, and gives the id, as the page has kept it.
export async function sent(page) {
  const before = (await history(page)).length;
  await page.locator("#send").click();
  await page.waitForFunction((count) => JSON.parse(localStorage.getItem("lesion.history") ?? "[]").length > count, before);
  return (await history(page))[0].id;
}

export async function send(page, file) {
  await choose(page, file);
  return sent(page);
}

export const history = (page) => page.evaluate(() => JSON.parse(localStorage.getItem("lesion.history")) ?? []);

export async function get(visit, id, { api, key } = visit.target) {
  return fetch(`${api}/result/${id}`, { headers: key ? { authorization: `Bearer ${key}` } : {} });
}
