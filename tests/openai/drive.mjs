// The official OpenAI client for Node against the proxy. Prints what it has checked, and last, as JSON,
// the tokens that the answers say and how many answers it has left.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

const require = createRequire(`${process.env.OPENAI_NODE}/`);
const OpenAI = require("openai").OpenAI;
const { version } = JSON.parse(readFileSync(`${process.env.OPENAI_NODE}/node_modules/openai/package.json`));

const { PROXY_URL: baseURL, PROXY_KEY: apiKey, FEW_KEY, SIX_KEY, POOR_KEY } = process.env;
const TEXT = "A growth of pigment cells, often round, with an even colour.";
const messages = [{ role: "user", content: "What is a naevus?" }];
const tool = { type: "function", function: { name: "measure", parameters: { type: "object", properties: { unit: { type: "string" } } } } };
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const seen = { tokens: 0, left: 0 };

const count = (answer) => {
  seen.tokens += answer.usage.prompt_tokens + answer.usage.completion_tokens;
  return answer;
};
const ask = (model, more = {}, options = {}) => client.chat.completions.create({ model, messages, ...more }, options);
const streamed = { stream: true, stream_options: { include_usage: true } };

const text = async (stream) => {
  let text = "";
  for await (const chunk of stream) {
    if (chunk.usage) count(chunk);
    for (const choice of chunk.choices) text += choice.delta.content ?? "";
  }
  return text;
};

// A client that asks again by itself, and the statuses that it meets.
const recording = (apiKey) => {
  const met = [];
  const record = async (...asked) => {
    const answer = await fetch(...asked);
    met.push(answer.status);
    return answer;
  };
  return [new OpenAI({ baseURL, apiKey, maxRetries: 2, fetch: record }), met];
};

const checks = {
  async plain() {
    assert.equal(count(await ask("text", { seed: 7 })).choices[0].message.content, TEXT);
  },
  async streaming() {
    assert.equal(await text(await ask("text", streamed)), TEXT);
  },
  async tools() {
    const call = count(await ask("tools", { tools: [tool] })).choices[0].message.tool_calls[0];
    assert.deepEqual([call.function.name, JSON.parse(call.function.arguments)], ["measure", { unit: "mm" }]);
  },
  async json_mode() {
    const answer = count(await ask("json", { response_format: { type: "json_object" } }));
    assert.equal(JSON.parse(answer.choices[0].message.content).round, true);
  },
  async models() {
    const names = [];
    for await (const model of client.models.list()) names.push(model.id);
    assert.ok(names.includes("text") && names.includes("tools"));
  },
  async errors() {
    await assert.rejects(ask("unknown"), (error) => error instanceof OpenAI.NotFoundError && error.code === "model_not_found");
    await assert.rejects(ask("refuses"), (error) => error instanceof OpenAI.BadRequestError && /too long/.test(error.message));
    await assert.rejects(ask("limited"), (error) => error instanceof OpenAI.RateLimitError && error.headers.get("retry-after") === "60");
    await assert.rejects(ask("down"), (error) => error instanceof OpenAI.InternalServerError && error.status === 502);
    const stranger = new OpenAI({ baseURL, apiKey: "sk-nobody", maxRetries: 0 });
    await assert.rejects(stranger.models.list(), OpenAI.AuthenticationError);
    const few = new OpenAI({ baseURL, apiKey: FEW_KEY, maxRetries: 0 });
    for (let asked = 0; asked < 2; asked += 1) await few.chat.completions.create({ model: "text", messages });
    await assert.rejects(few.chat.completions.create({ model: "text", messages }), OpenAI.RateLimitError);
  },
  async asked_again() {
    const asked = (client, model) => client.chat.completions.create({ model, messages });
    const [patient, met] = recording(apiKey);
    const answer = count(await asked(patient, "comes-back"));
    assert.deepEqual([answer.choices[0].message.content, met], [TEXT, [503, 200]]);
    // The limit of the key gives a request back in ten seconds: who does not wait as told gets no answer.
    const [limited, ofLimited] = recording(SIX_KEY);
    while (!ofLimited.includes(429)) {
      ofLimited.length = 0;
      assert.equal((await asked(limited, "text")).choices[0].message.content, TEXT);
    }
    assert.deepEqual(ofLimited.slice(-2), [429, 200]);
    // A budget that is used up is so for a month.
    const [poor, ofPoor] = recording(POOR_KEY);
    await asked(poor, "text");
    await assert.rejects(asked(poor, "text"), (error) => error instanceof OpenAI.RateLimitError && error.code === "insufficient_quota");
    assert.deepEqual(ofPoor, [200, 429]);
  },
  async timeouts_and_broken_streams() {
    await assert.rejects(ask("stalls", {}, { timeout: 1000 }), OpenAI.APIConnectionTimeoutError);
    seen.left += 1;
    await assert.rejects(async () => text(await ask("breaks-off", { stream: true })), OpenAI.APIError);
  },
  async cancelled() {
    const stream = await ask("stalls-midway", { stream: true });
    for await (const _ of stream) break;
    stream.controller.abort();
    seen.left += 1;
  },
  async concurrent_streams() {
    const texts = await Promise.all(Array.from({ length: 20 }, async () => text(await ask("text", streamed))));
    assert.deepEqual(new Set(texts), new Set([TEXT]));
  },
};

for (const [name, check] of Object.entries(checks)) {
  await check();
  console.log(`node ${version}: ${name}`);
}
console.log(JSON.stringify(seen));
