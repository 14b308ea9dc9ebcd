// What people do with the page. Each is a visit of its own; the name is what is tried.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { WORDS } from "./serve.mjs";
import { says, status } from "./visit.mjs";

const ROOT = join(import.meta.dirname, "../..");
const sample = (name) => join(ROOT, "model/samples", `${name}.png`);
const DISCLAIMER = "Research demonstration, not a medical device";

async function choose(page, file) {
  await page.locator("#file").setInputFiles(file);
  await page.locator("#check:not([hidden]), #photo-status:has-text('cannot open')").waitFor();
}

// Sends what is chosen, and gives the id, as the page has kept it.
async function sent(page) {
  const before = (await history(page)).length;
  await page.locator("#send").click();
  await page.waitForFunction((count) => JSON.parse(localStorage.getItem("lesion.history") ?? "[]").length > count, before);
  return (await history(page))[0].id;
}

async function send(page, file) {
  await choose(page, file);
  return sent(page);
}

const history = (page) => page.evaluate(() => JSON.parse(localStorage.getItem("lesion.history")) ?? []);

async function get(visit, id, { api, key } = visit.target) {
  return fetch(`${api}/result/${id}`, { headers: key ? { authorization: `Bearer ${key}` } : {} });
}

export async function completed(visit) {
  const page = await visit.page();
  await visit.looks(page, "start");
  await choose(page, sample("mole-drawn"));
  await says(status(page), "No fault was found");
  await visit.looks(page, "chosen");
  const id = await sent(page);
  await says(status(page), "Done.");
  const box = page.locator("#photo-result");
  const result = await (await get(visit, id)).json();
  assert.equal(result.status, "completed");
  assert.ok(result.predictions.length > 1);
  const rows = await box.locator(".bars li").allInnerTexts();
  assert.equal(rows.length, result.predictions.length);
  for (const [at, { name, probability, malignant }] of result.predictions.entries()) {
    assert.ok(rows[at].includes(name) && rows[at].includes(`${(100 * probability).toFixed(1)}%`), rows[at]);
    assert.equal(rows[at].includes("counted as malignant"), malignant, rows[at]);
  }
  const text = await box.innerText();
  assert.ok(text.includes(result.disclaimer) && text.includes(result.map.note));
  const described = result.description.text.replace(result.disclaimer, "").trim();
  assert.ok(text.includes(described), described);
  assert.ok(!/harmless\b/i.test(text.replace(result.map.note, "")), text);
  // The map lies over the photo, and can be taken off it.
  const overlay = box.locator(".overlay");
  await page.waitForFunction(() => document.querySelector(".overlay")?.naturalWidth > 0);
  const [photo, map] = [await box.locator(".stack .photo").boundingBox(), await overlay.boundingBox()];
  for (const side of ["x", "y", "width", "height"]) assert.ok(Math.abs(photo[side] - map[side]) < 1, `${side}: ${photo[side]}, ${map[side]}`);
  await visit.looks(page, "result");
  await box.getByLabel("Show the map").uncheck();
  assert.equal(await overlay.isVisible(), false);
  assert.deepEqual((await history(page)).map((entry) => Object.keys(entry)), [["id", "kind", "at", "open"]]);
  assert.ok(!JSON.stringify(await page.evaluate(() => ({ ...localStorage }))).includes("naevus"), "a result is kept on the device");
}

// A large photo with a place in its metadata: what goes over the wire is smaller and holds nothing of it.
export async function metadata_stays_on_the_device(visit) {
  const page = await visit.page();
  const jpeg = Buffer.from(await page.evaluate(async (png) => {
    const picture = await createImageBitmap(new Blob([Uint8Array.from(atob(png), (c) => c.charCodeAt(0))]));
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [3000, 4000];
    canvas.getContext("2d").drawImage(picture, 0, 0, 3000, 4000);
    const blob = await new Promise((done) => canvas.toBlob(done, "image/jpeg", 0.95));
    return Array.from(new Uint8Array(await blob.arrayBuffer()));
  }, readFileSync(sample("mole-drawn")).toString("base64")));
  // Exif with the orientation "turn right", and a comment where a phone has its place.
  const marker = "GPS-OF-A-HOME-47.3769";
  const exif = Buffer.concat([Buffer.from("Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0", "latin1"), Buffer.from(marker)]);
  const length = Buffer.alloc(2);
  length.writeUInt16BE(exif.length + 2);
  const photo = Buffer.concat([jpeg.subarray(0, 2), Buffer.from([0xff, 0xe1]), length, exif, jpeg.subarray(2)]);
  let body;
  await page.route("**/submit", async (route) => { body = route.request().postDataBuffer(); await route.continue(); });
  await send(page, { name: "IMG_2026.jpg", mimeType: "image/jpeg", buffer: photo });
  await says(status(page), /Done|again/);
  assert.ok(photo.includes(marker) && photo.includes("Exif"));
  assert.ok(!body.includes(marker) && !body.includes("Exif") && !body.includes("IMG_2026"), "metadata was sent");
  assert.ok(body.length < 4 * 1024 * 1024);
  const sizes = await page.locator("#sizes").textContent();
  // Turned upright: 4000 x 3000.
  assert.match(sizes, /^2048 × 1536 pixels/);
}

export async function retake(visit) {
  const page = await visit.page();
  await choose(page, sample("blurred"));
  await says(status(page), "may come back");
  assert.match(await page.locator("#quality").innerText(), /blurred/);
  await visit.looks(page, "warned");
  await sent(page);
  await says(status(page), "Please take the photo again");
  const text = await page.locator("#photo-result").innerText();
  assert.match(text, /blurred. Hold still/);
  assert.ok(!/\d %|\d%/.test(text), text);
  await visit.looks(page, "retake");
  await page.getByRole("button", { name: "New photo" }).click();
  assert.ok(await page.locator("#choose").isVisible());
}

// The page's first look is the host's: the same formulas on the same photo.
export async function the_page_measures_as_the_host_does(visit) {
  const page = await visit.page();
  for (const name of ["blurred", "mole-drawn", "red-spot-drawn", "hairy-mole-drawn", "not-a-lesion"]) {
    const id = await send(page, sample(name));
    await says(status(page), /Done|again/);
    const { quality } = await (await get(visit, id)).json();
    const measured = await page.evaluate(async (png) => {
      const { measure } = await import("./quality.js");
      const picture = await createImageBitmap(new Blob([Uint8Array.from(atob(png), (c) => c.charCodeAt(0))]));
      const canvas = document.createElement("canvas");
      [canvas.width, canvas.height] = [picture.width, picture.height];
      const context = canvas.getContext("2d");
      context.drawImage(picture, 0, 0);
      return measure(context.getImageData(0, 0, canvas.width, canvas.height));
    }, readFileSync(sample(name)).toString("base64"));
    assert.equal(measured.side_px, quality.measures.side_px, name);
    for (const [measure, tolerance] of [["brightness", 2], ["contrast", 3], ["sharpness", 0.1 * quality.measures.sharpness + 0.02]]) {
      const off = Math.abs(measured[measure] - quality.measures[measure]);
      assert.ok(off <= tolerance, `${name}: ${measure} is ${measured[measure]} here and ${quality.measures[measure]} there`);
    }
    await page.getByRole("button", { name: "New photo" }).click();
  }
}

export async function abstention(visit) {
  const page = await visit.page();
  await send(page, sample("not-a-lesion"));
  await says(status(page), "Done.");
  const text = await page.locator("#photo-result").innerText();
  assert.match(text, /No label/);
  assert.match(text, /neither good nor bad/);
  assert.equal(await page.locator(".bars").count(), 0);
  assert.ok(!/naevus|melanoma|%/i.test(text), text);
  await visit.looks(page, "abstained");
}

export async function what_is_no_picture_is_not_sent(visit) {
  const page = await visit.page();
  await choose(page, { name: "letter.pdf", mimeType: "application/pdf", buffer: Buffer.from("%PDF-1.4 ") });
  await says(status(page), "cannot open the file");
  assert.equal(visit.requests.filter((request) => request.url().endsWith("/submit")).length, 0);
}

export async function a_browser_that_alters_pictures_sends_none(visit) {
  const context = await visit.context();
  await context.addInitScript(() => {
    const read = CanvasRenderingContext2D.prototype.getImageData;
    CanvasRenderingContext2D.prototype.getImageData = function (...area) {
      const picture = read.apply(this, area);
      picture.data[40] ^= 1;
      return picture;
    };
  });
  const page = await visit.page(context);
  await page.locator("#file").setInputFiles(sample("mole-drawn"));
  await says(status(page), "alters pictures");
  assert.equal(await page.locator("#check").isVisible(), false);
}

export async function offline_and_back(visit) {
  const page = await visit.page();
  const context = visit.contexts[0];
  await choose(page, sample("red-spot-drawn"));
  await context.setOffline(true);
  await page.locator("#send").click();
  await says(status(page), "no connection");
  await visit.looks(page, "waiting");
  visit.target.gate.closed = true;
  await context.setOffline(false);
  // The model server is silent: the photo has a label and no description yet.
  await says(status(page), "description is being written");
  await page.locator(".bars").waitFor();
  await context.setOffline(true);
  await says(page.locator("#photo-result"), "No connection");
  await visit.looks(page, "offline");
  visit.target.gate.release();
  await context.setOffline(false);
  await says(status(page), "Done.");
  const submitted = visit.requests.filter((request) => request.url().endsWith("/submit") && request.method() === "POST");
  const keys = new Set(submitted.map((request) => request.headers()["idempotency-key"]));
  assert.equal(keys.size, 1);
  assert.equal((await history(page)).length, 1, "sent twice");
}

export async function long_poll_where_there_is_no_socket(visit) {
  const page = await visit.page();
  await page.route("**/socket-tickets", (route) => (route.request().method() === "POST" ? route.abort() : route.continue()));
  visit.target.gate.closed = true;
  await send(page, sample("mole-drawn"));
  await says(status(page), "description is being written");
  await says(page.locator("#photo-result"), "No live connection");
  visit.target.gate.release();
  await says(status(page), "Done.");
  assert.ok(visit.requests.some((request) => request.url().includes("?wait=25")));
}

// The socket alone tells: nothing is polled while it is there.
// A proxy that answers for a host which is away, in words of its own.
export async function a_gateway_in_trouble_is_waited_for(visit) {
  const page = await visit.page();
  let refusals = 1;
  await page.route(/\/submit$|\/result\//, (route) => (refusals-- > 0 && route.request().method() !== "OPTIONS"
    ? route.fulfill({ status: 502, contentType: "text/html", body: "<h1>Bad Gateway</h1>" })
    : route.continue()));
  await choose(page, sample("mole-drawn"));
  await page.locator("#send").click();
  // From another origin a browser does not say what it was.
  await says(status(page), /host is busy|no connection/);
  await says(status(page), "Done.");
  assert.equal((await history(page)).length, 1);
}

export async function told_over_the_socket(visit) {
  const page = await visit.page();
  visit.target.gate.closed = true;
  await send(page, sample("mole-drawn"));
  await says(status(page), "description is being written");
  await says(page.locator("#photo-result"), "Told as it happens");
  const before = visit.requests.filter((request) => request.url().includes("?wait=")).length;
  visit.target.gate.release();
  await says(status(page), "Done.");
  assert.equal(visit.requests.filter((request) => request.url().includes("?wait=")).length, before);
}

export async function two_tabs(visit) {
  const first = await visit.page();
  const id = await send(first, sample("mole-drawn"));
  await says(status(first), "Done.");
  const second = await visit.page(visit.contexts[0]);
  await second.getByRole("tab", { name: "History" }).click();
  assert.equal(await second.locator("#entries li").count(), 1);
  await second.getByRole("button", { name: "Open" }).click();
  await says(status(second), "Done.");
  // This tab has never had the photo.
  await says(second.locator("#photo-result"), "The photo is not kept on this device");
  await visit.looks(second, "opened");
  await second.getByRole("button", { name: "Delete", exact: true }).click();
  await second.locator("#confirm-yes").click();
  await says(status(second), "Deleted, on the host and here.");
  await says(status(first), "It has been deleted.");
  assert.equal(await first.locator("#photo-result").isVisible(), false);
  assert.equal((await get(visit, id)).status, 404);
}

// What was under way when the page was closed is there when it is opened again.
export async function reloading_goes_on_with_what_is_under_way(visit) {
  const page = await visit.page();
  visit.target.gate.closed = true;
  const id = await send(page, sample("mole-drawn"));
  await says(status(page), "description is being written");
  await page.reload();
  await says(status(page), "description is being written");
  visit.target.gate.release();
  await says(status(page), "Done.");
  assert.deepEqual((await history(page)).map((entry) => [entry.id, entry.open]), [[id, false]]);
}

export async function erasing(visit) {
  const page = await visit.page();
  const id = await send(page, sample("mole-drawn"));
  await says(status(page), "Done.");
  await page.getByRole("button", { name: "Delete", exact: true }).click();
  await visit.looks(page, "asked");
  await page.locator("#confirm-no").click();
  assert.equal((await get(visit, id)).status, 200, "deleted without a yes");
  await page.getByRole("button", { name: "Delete", exact: true }).click();
  await page.locator("#confirm-yes").click();
  await says(status(page), "Deleted, on the host and here.");
  assert.equal((await get(visit, id)).status, 404);
  assert.deepEqual(await history(page), []);
  assert.equal(await page.evaluate(() => document.activeElement.id), "photo-heading");
  // From the list, while the host cannot be reached: it stays.
  const other = await send(page, sample("red-spot-drawn"));
  await says(status(page), "Done.");
  await page.getByRole("tab", { name: "History" }).click();
  await visit.looks(page, "history");
  await page.route(`**/result/${other}`, (route) => (route.request().method() === "DELETE" ? route.abort() : route.continue()));
  await page.locator("#entries").getByRole("button", { name: "Delete" }).click();
  await page.locator("#confirm-yes").click();
  await says(status(page, "history"), "cannot be reached");
  assert.equal((await history(page)).length, 1);
  await page.unroute(`**/result/${other}`);
  await page.locator("#entries").getByRole("button", { name: "Delete" }).click();
  await page.locator("#confirm-yes").click();
  await says(status(page, "history"), "Deleted, on the host and here.");
  assert.equal((await get(visit, other)).status, 404);
}

export async function forgetting_this_device(visit) {
  const page = await visit.page();
  const id = await send(page, sample("mole-drawn"));
  await says(status(page), "Done.");
  await page.getByRole("tab", { name: "History" }).click();
  await page.getByRole("button", { name: "Forget all this" }).click();
  await page.locator("#confirm-yes").click();
  await says(status(page, "history"), "forgotten everything");
  assert.deepEqual(await page.evaluate(() => [localStorage.length, sessionStorage.length]), [0, 0]);
  await page.getByRole("tab", { name: "Photo" }).click();
  assert.equal(await page.locator("#photo-result").isVisible(), false);
  assert.equal((await get(visit, id)).status, 200, "forgetting is not deleting");
}

export async function asking(visit) {
  const page = await visit.page();
  await page.getByRole("tab", { name: "Ask" }).click();
  await visit.looks(page, "start");
  visit.target.gate.closed = true;
  await page.getByLabel("Your question").fill("What is a naevus?");
  await page.getByRole("button", { name: "Ask", exact: true }).click();
  // Half of it is there before the model server goes on.
  await says(page.locator("#answer"), WORDS.slice(0, 2).join("").trim());
  assert.ok(!(await page.locator("#answer").innerText()).includes(WORDS[2]));
  await says(status(page, "ask"), "answer is being written");
  visit.target.gate.release();
  await says(status(page, "ask"), "Done.");
  assert.equal(await page.locator("#answer").innerText(), WORDS.join(""));
  const text = await page.locator("#ask").innerText();
  assert.ok(text.includes(DISCLAIMER) && text.includes("unchecked"));
  await visit.looks(page, "answered");
  const [{ id, kind }] = await history(page);
  assert.equal(kind, "prompt");
  await page.getByRole("button", { name: "Delete", exact: true }).click();
  await page.locator("#confirm-yes").click();
  await says(status(page, "ask"), "Deleted, on the host and here.");
  assert.equal((await get(visit, id)).status, 404);
}

export async function by_keyboard_alone(visit) {
  const page = await visit.page();
  const active = () => page.evaluate(() => document.activeElement.id);
  const press = async (...keys) => { for (const key of keys) await page.keyboard.press(key); };
  await press("Tab", "Tab");
  assert.equal(await active(), "tab-photo");
  await press("ArrowRight");
  assert.equal(await active(), "tab-ask");
  assert.ok(await page.locator("#ask").isVisible());
  await press("End", "ArrowRight");
  assert.equal(await active(), "tab-photo");
  await press("Tab");
  assert.equal(await active(), "camera");
  const outline = await page.evaluate(() => getComputedStyle(document.activeElement.closest("label")).outlineStyle);
  assert.equal(outline, "solid");
  await press("Tab");
  assert.equal(await active(), "file");
  const chooser = page.waitForEvent("filechooser");
  await press("Space");
  await (await chooser).setFiles(sample("mole-drawn"));
  await page.locator("#check:not([hidden])").waitFor();
  assert.equal(await active(), "send");
  await press("Enter");
  await says(status(page), "Done.");
  assert.equal(await active(), "photo-heading");
  for (let tabs = 0; (await page.evaluate(() => document.activeElement.textContent)) !== "Delete"; tabs++) {
    assert.ok(tabs < 10, "Delete is not reached");
    await press("Tab");
  }
  await press("Enter", "Escape");
  assert.equal((await history(page)).length, 1);
  // Not on what cannot be undone.
  await press("Enter");
  assert.equal(await active(), "confirm-no");
  await press("Shift+Tab", "Enter");
  await says(status(page), "Deleted");
}

export async function in_german(visit) {
  const page = await visit.page(await visit.context({ locale: "de-AT" }));
  assert.equal(await page.evaluate(() => document.documentElement.lang), "de");
  await send(page, sample("mole-drawn"));
  await says(status(page), "Fertig.");
  const box = page.locator("#photo-result");
  const text = await box.innerText();
  for (const words of ["Melanozytärer Nävus", "zählt als bösartig", "Nicht diagnostisch", "keine Diagnose", "Der Host schreibt Beschreibungen auf Englisch"]) {
    assert.ok(text.includes(words), words);
  }
  assert.ok(!text.includes(DISCLAIMER), "the disclaimer is not translated");
  await visit.looks(page, "result");
  await page.locator("#language").selectOption("en");
  await says(status(page), "Done.");
  assert.ok((await box.innerText()).includes(DISCLAIMER));
  assert.equal(await page.evaluate(() => document.documentElement.lang), "en");
  await page.reload();
  await says(page.locator("h1"), "Skin-lesion demonstration");
}

export async function a_host_with_keys(visit) {
  const { url, api, key } = visit.target.keyed;
  const page = await visit.page(null, { url });
  await choose(page, sample("mole-drawn"));
  await page.locator("#send").click();
  await says(page.locator("#trouble"), "asks for a key");
  assert.equal(await page.evaluate(() => document.activeElement.id), "key");
  await visit.looks(page, "wanted");
  await page.locator("#key").fill(`lesion_0123456789ab_${"0".repeat(64)}`);
  await page.keyboard.press("Enter");
  await page.locator("#send").click();
  await says(page.locator("#trouble"), "does not take this key");
  await page.locator("#key").fill(key);
  await page.keyboard.press("Enter");
  const id = await sent(page);
  await says(status(page), "Done.");
  assert.equal((await get(visit, id, { api, key })).status, 200);
  assert.equal((await get(visit, id, { api, key: null })).status, 401);
  assert.ok(!JSON.stringify(await page.evaluate(() => ({ ...localStorage }))).includes(key), "the key outlives the tab");
  // Another tab has no key, and so sees nothing.
  const other = await visit.page(visit.contexts[0], { url, key: null });
  await other.getByRole("tab", { name: "History" }).click();
  await other.getByRole("button", { name: "Open" }).click();
  await says(other.locator("#trouble"), "asks for a key");
  assert.equal((await history(other)).length, 1);
  // This host has no language model.
  await page.getByRole("tab", { name: "Ask" }).click();
  await page.getByLabel("Your question").fill("What is a naevus?");
  await page.keyboard.press("Enter");
  await says(status(page, "ask"), "no language model");
}
a_host_with_keys.only = "embedded";

// Without a key, where the host lets guests in: photos by their ids, and no questions.
export async function a_guest(visit) {
  const { url, api } = visit.target.guests;
  const page = await visit.page(null, { url });
  assert.equal(await page.evaluate(() => isSecureContext), false);
  const id = await send(page, sample("mole-drawn"));
  await says(status(page), "Done.");
  assert.equal((await get(visit, id, { api })).status, 200);
  await page.getByRole("tab", { name: "Ask" }).click();
  await page.getByLabel("Your question").fill("What is a naevus?");
  await page.keyboard.press("Enter");
  await says(status(page, "ask"), "The host does not allow this");
  await page.getByRole("tab", { name: "History" }).click();
  await page.locator("#entries").getByRole("button", { name: "Delete" }).click();
  await page.locator("#confirm-yes").click();
  await says(status(page, "history"), "Deleted, on the host and here.");
  assert.equal((await get(visit, id, { api })).status, 404);
}
a_guest.only = "embedded";

export async function the_host_dies_and_comes_back(visit) {
  const { host } = visit.target;
  const page = await visit.page();
  visit.target.gate.closed = true;
  const id = await send(page, sample("mole-drawn"));
  await says(status(page), "description is being written");
  await host.kill();
  try {
    await says(page.locator("#photo-result"), "No live connection");
  } finally {
    visit.target.gate.release();
    await host.start();
  }
  await says(status(page), "Done.");
  assert.deepEqual((await history(page)).map((entry) => [entry.id, entry.open]), [[id, false]]);
}
the_host_dies_and_comes_back.only = "embedded";
