// What people send and read. Each is a visit of its own; the name is what is tried.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { WORDS } from "./serve.mjs";
import { DISCLAIMER, choose, get, history, sample, send, sent } from "./steps.mjs";
import { says, status } from "./visit.mjs";

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
    const share = probability < 0.001 ? "< 0.1%" : probability > 0.999 ? "> 99.9%" : `${(100 * probability).toFixed(1)}%`;
    assert.ok(rows[at].includes(name) && rows[at].includes(share), rows[at]);
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

// The host's answer about a real photo, as if its attempts had been used up: none fails here by itself.
export async function a_job_that_failed(visit) {
  const page = await visit.page();
  const id = await send(page, sample("mole-drawn"));
  await says(status(page), "Done.");
  await page.route(`**/result/${id}*`, async (route) => {
    if (route.request().method() !== "GET") return route.continue();
    const response = await route.fetch();
    const error = { code: "attempts_exhausted", message: "No attempt has succeeded.", retryable: true };
    const failed = { status: "failed", error, predictions: [], abstained: null, description: null, map: null };
    return route.fulfill({ response, json: { ...(await response.json()), ...failed } });
  });
  await page.getByRole("tab", { name: "History" }).click();
  await page.getByRole("button", { name: "Open" }).click();
  await page.locator("#photo-result h3").first().waitFor();
  const text = await page.locator("#photo-result").innerText();
  assert.ok(text.includes(DISCLAIMER), text);
  assert.ok(!/naevus|melanoma|%|attempts_exhausted/i.test(text), text);
  assert.ok(!(await status(page).innerText()).includes("Done."), "as if it had gone well");
  assert.equal(await page.locator(".bars").count(), 0);
  await visit.looks(page, "failed");
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
  // Long before the key that opens it: Playwright sets its interception up beside what it is told next.
  const chooser = page.waitForEvent("filechooser");
  chooser.catch(() => {});
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
