// The second tab: a question to the host's language model, answered as it is written.
import { ApiError, random, submit } from "./api.js";
import { $ } from "./dom.js";
import * as history from "./history.js";
import * as live from "./live.js";
import { View } from "./result.js";
import { t } from "./text.js";

export let view;
let asking = false;

export function open() {
  view = new View({ kind: "prompt", status: $("ask-status"), box: $("ask-result"), heading: $("ask-heading") });
  $("ask-form").addEventListener("submit", (event) => {
    event.preventDefault();
    send($("question").value.trim());
  });
  // As in other chats; Shift makes a new line.
  $("question").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    $("ask-form").requestSubmit();
  });
}

export const render = () => view.render();
export const show = (id) => view.show(id);

export function forget() {
  view.clear();
  $("question").value = "";
}

async function send(prompt) {
  if (!prompt || asking) return;
  asking = true;
  view.clear();
  view.say(() => t("ask.sending"));
  const [key, age] = [random(), history.age()];
  try {
    const id = (await live.ask({ prompt, idempotency_key: key })) ?? (await submit(JSON.stringify({ prompt }), "application/json", key));
    if (history.age() !== age) {
      live.unfollow(id);
      return;
    }
    history.add(id, "prompt");
    view.show(id, { question: prompt, words: () => t("answering") });
    $("question").value = "";
  } catch (error) {
    // A frame of the socket has the API's codes too.
    if (history.age() !== age) return;
    const failure = error instanceof ApiError ? error : new ApiError(error.code, 0, error);
    view.say(() => failure.words);
  } finally {
    asking = false;
  }
}
