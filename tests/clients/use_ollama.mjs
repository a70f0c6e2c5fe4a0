// Ollama's client for JavaScript against a server: node use_ollama.mjs URL KEY. Prints DONE when all is as it should be.
import assert from "node:assert/strict";
import { Ollama } from "ollama";

const [url, key] = process.argv.slice(2);
const client = new Ollama({ host: url, headers: { Authorization: `Bearer ${key}` } });
const model = "skald";
const options = { temperature: 0 };
const sum = [{ role: "user", content: "What is 47 + 38?" }];
const weather = [{ role: "user", content: "What is the weather in Bergen?" }];
const city = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
const tool = {
  type: "function",
  function: { name: "get_weather", description: "Get the weather of a city.", parameters: city },
};

const whole = await client.chat({ model, messages: sum, options });
assert.match(whole.message.content, /85/);
let text = "";
for await (const part of await client.chat({ model, messages: sum, options, stream: true })) text += part.message.content;
assert.equal(text, whole.message.content);

const called = await client.chat({ model, messages: weather, tools: [tool], options });
assert.deepEqual(called.message.tool_calls[0].function, { index: 0, name: "get_weather", arguments: { city: "Bergen" } });

const schema = { type: "object", properties: { age: { type: "integer" } }, required: ["age"], additionalProperties: false };
const formed = await client.chat({ model, messages: sum, format: schema, options: { seed: 3 } });
assert.deepEqual(Object.keys(JSON.parse(formed.message.content)), ["age"]);

assert.match((await client.generate({ model, prompt: "Who are you?", options })).response, /\w/);
assert.equal((await client.embed({ model, input: ["a ship", "a song"] })).embeddings.length, 2);
assert.equal((await client.list()).models[0].model, "skald:latest");
assert.ok((await client.show({ model })).capabilities.includes("completion"));

await assert.rejects(client.chat({ model: "no", messages: sum }), (error) => error.name === "ResponseError" && error.status_code === 404);
await assert.rejects(client.chat({ model, messages: sum, options: { temperature: -1 } }), /temperature/);

const long = await client.generate({
  model, prompt: "Once", raw: true, stream: true, options: { ignore_eos: true, num_predict: 1900 },
});
await assert.rejects(async () => {
  for await (const _ of long) long.abort();
}, { name: "AbortError" });
console.log("DONE");
