// The first tab: a photo is chosen, made smaller, looked at, and sent.
import { pause, random, submit } from "./api.js";
import { $, el } from "./dom.js";
import * as history from "./history.js";
import { measure, reasons } from "./quality.js";
import { View } from "./result.js";
import { t } from "./text.js";

const LONGEST_PX = 2048;
const MOST_BYTES = 4 * 1024 * 1024;
const QUALITIES = [0.9, 0.8, 0.6];
const AGAIN_MS = 5_000;

export let view;
let limits;
// What has been chosen and not yet sent.
let draft = null;
// Photos that were sent from this page, by id, for the map; gone with the page.
const photos = new Map();

export function open(config) {
  limits = config.quality;
  view = new View({
    kind: "photo", status: $("photo-status"), box: $("photo-result"), heading: $("photo-heading"),
    onCleared: () => { $("choose").hidden = false; },
  });
  view.again = el("button", { type: "button", class: "main", onclick: startAnew });
  view.buttons.prepend(view.again);
  for (const input of [$("camera"), $("file")]) {
    input.addEventListener("change", () => { if (input.files.length) choose(input.files[0]); input.value = ""; });
  }
  $("send").addEventListener("click", send);
  $("again").addEventListener("click", startAnew);
}

export function render() {
  view.again.textContent = t("new.photo");
  view.render();
  showDraft();
}

export function show(id, words) {
  discard();
  view.show(id, { photo: photos.get(id), words });
  $("choose").hidden = true;
}

// What was deleted is not kept in memory either.
export function drop(id) {
  const address = photos.get(id);
  if (!address) return;
  URL.revokeObjectURL(address);
  photos.delete(id);
  if ($("preview").src === address) $("preview").removeAttribute("src");
}

export function keep(ids) {
  for (const id of photos.keys()) if (!ids.includes(id)) drop(id);
}

export function forget() {
  discard();
  view.clear();
  $("preview").removeAttribute("src");
  for (const address of photos.values()) URL.revokeObjectURL(address);
  photos.clear();
}

function startAnew() {
  discard();
  view.clear();
  $("file").focus();
}

function discard() {
  if (draft?.address && ![...photos.values()].includes(draft.address)) URL.revokeObjectURL(draft.address);
  draft = null;
  $("check").hidden = true;
  $("send").disabled = false;
}

async function choose(file) {
  discard();
  view.clear();
  view.say(() => t("photo.reading"));
  const chosen = draft = { key: random() };
  if (!isFaithful()) {
    discard();
    view.say(() => t("photo.altered"));
    return;
  }
  try {
    const { blob, picture } = await shrink(file);
    if (draft !== chosen) return;
    const address = URL.createObjectURL(blob);
    const found = limits ? reasons(measure(picture), limits) : [];
    Object.assign(chosen, { blob, address, found, width: picture.width, height: picture.height });
  } catch {
    if (draft !== chosen) return;
    discard();
    view.say(() => t("photo.unreadable"));
    return;
  }
  view.say(() => t(chosen.found.length ? "photo.poor" : "photo.good"));
  $("choose").hidden = true;
  $("check").hidden = false;
  // What is better done next is what stands out.
  $("send").classList.toggle("main", chosen.found.length === 0);
  $("again").classList.toggle("main", chosen.found.length > 0);
  showDraft();
  $(chosen.found.length ? "again" : "send").focus();
}

function showDraft() {
  if (!draft?.blob) return;
  $("preview").src = draft.address;
  $("quality").replaceChildren(...draft.found.map((reason) => el("li", {}, t(`reason.${reason}`))));
  const { width, height, blob } = draft;
  $("sizes").textContent = t("photo.sizes", { width, height, kilobytes: Math.ceil(blob.size / 1000) });
}

// Browsers that guard against being recognised may read a canvas otherwise than it was drawn. A photo that was
// altered so would be judged as if it were the one that was taken.
function isFaithful() {
  const context = el("canvas").getContext("2d", { willReadFrequently: true });
  const drawn = context.createImageData(32, 32);
  drawn.data.forEach((_, at) => { drawn.data[at] = at % 4 === 3 ? 255 : (at * 37) % 251; });
  context.putImageData(drawn, 0, 0);
  const read = context.getImageData(0, 0, 32, 32).data;
  return drawn.data.every((value, at) => value === read[at]);
}

// Upright, at most 2048 pixels long, and encoded anew: a canvas has no metadata to hand on.
async function shrink(file) {
  const bitmap = await createImageBitmap(file, { imageOrientation: "from-image" });
  for (let longest = LONGEST_PX; ; longest /= 2) {
    const scale = Math.min(1, longest / Math.max(bitmap.width, bitmap.height));
    const canvas = el("canvas");
    canvas.width = Math.max(1, Math.round(bitmap.width * scale));
    canvas.height = Math.max(1, Math.round(bitmap.height * scale));
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.imageSmoothingQuality = "high";
    // JPEG knows no transparency.
    context.fillStyle = "white";
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    for (const quality of QUALITIES) {
      const blob = await new Promise((done) => canvas.toBlob(done, "image/jpeg", quality));
      if (blob.size > MOST_BYTES) continue;
      bitmap.close();
      return { blob, picture: context.getImageData(0, 0, canvas.width, canvas.height) };
    }
  }
}

// Under one idempotency key, however often it takes: a photo whose answer was lost is not worked twice.
async function send() {
  const [sent, age] = [draft, history.age()];
  $("send").disabled = true;
  view.say(() => t("photo.sending"));
  while (draft === sent) {
    try {
      const id = await submit(sent.blob, "image/jpeg", sent.key);
      if (history.age() !== age) return;
      history.add(id, "photo");
      photos.set(id, sent.address);
      if (draft !== sent) return;
      show(id, () => t("status.pending"));
      $("photo-heading").focus();
      return;
    } catch (error) {
      if (draft !== sent) return;
      if (!error.passes) {
        view.say(() => error.words);
        $("send").disabled = false;
        return;
      }
      view.say(() => (error.code === "network" ? t("photo.waiting") : error.words));
      await pause(error.retryAfter * 1000 || AGAIN_MS);
    }
  }
}
