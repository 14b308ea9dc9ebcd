// What gets in between, and what becomes of what was sent. Each is a visit of its own; the name is what is tried.
import assert from "node:assert/strict";
import { choose, get, history, sample, send, sent } from "./steps.mjs";
import { says, status } from "./visit.mjs";

export async function offline_and_back(visit) {
  const page = await visit.page();
  const context = visit.contexts[0];
  await choose(page, sample("mole-drawn"));
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
  await sendHeldBack(visit, page);
  await says(page.locator("#photo-result"), "No live connection");
  visit.target.gate.release();
  await says(status(page), "Done.");
  assert.ok(visit.requests.some((request) => request.url().includes("?wait=25")));
}

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

// The socket alone tells: nothing is polled while it is there.
export async function told_over_the_socket(visit) {
  const page = await visit.page();
  await sendHeldBack(visit, page);
  await says(page.locator("#photo-result"), "Told as it happens");
  const before = visit.requests.filter((request) => request.url().includes("?wait=")).length;
  visit.target.gate.release();
  await says(status(page), "Done.");
  assert.equal(visit.requests.filter((request) => request.url().includes("?wait=")).length, before);
}

// The frame says that it has ended, and what it has come to is not to be had at that moment.
export async function an_end_that_cannot_be_read_at_once_is_read_again(visit) {
  const page = await visit.page();
  let refusals = 1;
  // It is the first answer that knows of the end, whenever it was asked for.
  await page.route(/\/result\//, async (route) => {
    if (route.request().method() !== "GET") return route.continue();
    const response = await route.fetch();
    const isEnd = response.status() === 200 && (await response.json()).status === "completed";
    return isEnd && refusals-- > 0 ? route.fulfill({ status: 502, body: "" }) : route.fulfill({ response });
  });
  await sendHeldBack(visit, page);
  await says(page.locator("#photo-result"), "Told as it happens");
  visit.target.gate.release();
  await says(status(page), "Done.");
  assert.ok(refusals < 0, "it was not refused");
}

// As behind a proxy that opens WebSockets and carries nothing over them.
export async function a_socket_that_closes_as_soon_as_it_is_open(visit) {
  const page = await visit.page();
  await page.routeWebSocket(/ticket=/, (socket) => { setTimeout(() => socket.close(), 50); });
  await sendHeldBack(visit, page);
  await page.waitForTimeout(12_000);
  const tickets = visit.requests.filter((request) => request.url().endsWith("/socket-tickets") && request.method() === "POST");
  assert.ok(tickets.length <= 5, `${tickets.length} tickets in twelve seconds`);
  assert.ok(tickets.length >= 2, "it is tried again");
  visit.target.gate.release();
  await says(status(page), "Done.");
}

// A host that takes no more subscriptions for the moment: the job is polled, and subscribed to later.
export async function a_refused_subscription_is_made_up_for(visit) {
  const page = await visit.page();
  let refusals = 1;
  await page.routeWebSocket(/ticket=/, (socket) => {
    const host = socket.connectToServer();
    socket.onMessage((message) => {
      const { action, request_id } = JSON.parse(message);
      if (action !== "subscribe" || refusals-- <= 0) return host.send(message);
      socket.send(JSON.stringify({ v: 1, type: "error", code: "too_many_requests", message: "Wait.", request_id }));
    });
  });
  visit.target.gate.closed = true;
  await send(page, sample("mole-drawn"));
  await says(page.locator("#photo-result"), "No live connection");
  await says(status(page), "description is being written");
  assert.ok(visit.requests.some((request) => request.url().includes("?wait=25")), "it is not asked for");
  await says(page.locator("#photo-result"), "Told as it happens");
  visit.target.gate.release();
  await says(status(page), "Done.");
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
  const id = await sendHeldBack(visit, page);
  await page.reload();
  await says(status(page), "description is being written");
  visit.target.gate.release();
  await says(status(page), "Done.");
  assert.deepEqual((await history(page)).map((entry) => [entry.id, entry.open]), [[id, false]]);
}

export async function erasing(visit) {
  const context = await visit.context();
  await context.addInitScript(() => {
    const revoke = URL.revokeObjectURL;
    globalThis.revoked = [];
    URL.revokeObjectURL = (address) => { globalThis.revoked.push(address); revoke.call(URL, address); };
  });
  const page = await visit.page(context);
  const kept = async (address) => !(await page.evaluate(() => globalThis.revoked)).includes(address);
  await choose(page, sample("mole-drawn"));
  const address = await page.locator("#preview").getAttribute("src");
  const id = await sent(page);
  await says(status(page), "Done.");
  assert.ok(await kept(address), "the photo lies under the map");
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
  assert.equal(await kept(address), false, "the photo is still in memory");
  assert.equal(await page.locator("#preview").getAttribute("src"), null);
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
  const others = await page.evaluate(() => globalThis.revoked.length);
  await page.locator("#entries").getByRole("button", { name: "Delete" }).click();
  await page.locator("#confirm-yes").click();
  await says(status(page, "history"), "Deleted, on the host and here.");
  assert.equal((await get(visit, other)).status, 404);
  assert.equal(await page.evaluate(() => globalThis.revoked.length), others + 1, "the photo is still in memory");
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

// What is on its way when all is forgotten does not come back with its answer.
export async function forgetting_what_is_being_sent(visit) {
  const page = await visit.page();
  await send(page, sample("mole-drawn"));
  await says(status(page), "Done.");
  await page.getByRole("button", { name: "New photo" }).click();
  let answer;
  const answered = new Promise((resolve) => { answer = resolve; });
  await page.route(/\/submit$/, async (route) => {
    const response = await route.fetch();
    await answered;
    await route.fulfill({ response });
  });
  await choose(page, sample("red-spot-drawn"));
  await page.locator("#send").click();
  await page.getByRole("tab", { name: "Ask" }).click();
  await page.getByLabel("Your question").fill("What is a naevus?");
  await page.getByRole("tab", { name: "History" }).click();
  await page.getByRole("button", { name: "Forget all this" }).click();
  await page.locator("#confirm-yes").click();
  await says(status(page, "history"), "forgotten everything");
  const heard = page.waitForResponse(/\/submit$/);
  answer();
  await (await heard).finished();
  await page.waitForTimeout(500);
  assert.deepEqual(await history(page), []);
  assert.equal(await page.locator("#question").inputValue(), "");
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

// A connection is that of the key which has opened it.
export async function another_key_is_another_caller(visit) {
  const { url, api, key } = visit.target.keyed;
  const headers = { authorization: `Bearer ${key}`, "content-type": "application/json" };
  const body = JSON.stringify({ name: "another", caller: "another", scopes: ["jobs"] });
  const other = (await (await fetch(`${api}/admin/keys`, { method: "POST", headers, body })).json()).key;
  const page = await visit.page(null, { url, key });
  const first = await send(page, sample("mole-drawn"));
  await says(status(page), "Done.");
  await page.locator("#key-open").click();
  await page.locator("#key").fill(other);
  await page.keyboard.press("Enter");
  await page.getByRole("button", { name: "New photo" }).click();
  const second = await send(page, sample("red-spot-drawn"));
  await says(status(page), "Done.");
  const tickets = visit.requests.filter((request) => request.url().endsWith("/socket-tickets") && request.method() === "POST");
  assert.deepEqual(tickets.map((request) => request.headers().authorization), [`Bearer ${key}`, `Bearer ${other}`]);
  assert.equal((await get(visit, first, { api, key: other })).status, 404);
  assert.equal((await get(visit, second, { api, key: other })).status, 200);
}
another_key_is_another_caller.only = "embedded";

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
  const id = await sendHeldBack(visit, page);
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

// Sends a photo whose description is not written before the gate is released.
async function sendHeldBack(visit, page) {
  visit.target.gate.closed = true;
  const id = await send(page, sample("mole-drawn"));
  await says(status(page), "description is being written");
  return id;
}
