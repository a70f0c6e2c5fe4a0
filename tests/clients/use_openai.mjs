// OpenAI's client for JavaScript against a server: node use_openai.mjs URL KEY. Prints DONE when all is as it should be.
import assert from "node:assert/strict";
import OpenAI from "openai";

const [url, key] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: key, maxRetries: 0, timeout: 60_000 });
const model = "skald";
const sum = [{ role: "user", content: "What is 47 + 38?" }];
const weather = [{ role: "user", content: "What is the weather in Bergen?" }];
const city = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
const tool = {
  type: "function",
  function: { name: "get_weather", description: "Get the weather of a city.", parameters: city },
};

const whole = await client.chat.completions.create({ model, messages: sum, temperature: 0 });
assert.match(whole.choices[0].message.content, /85/);

let text = "";
for await (const chunk of await client.chat.completions.create({ model, messages: sum, temperature: 0, stream: true }))
  text += chunk.choices[0]?.delta.content ?? "";
assert.equal(text, whole.choices[0].message.content);

const runner = client.chat.completions.stream({ model, messages: weather, tools: [tool], temperature: 0 });
const [call] = (await runner.finalChatCompletion()).choices[0].message.tool_calls;
assert.deepEqual([call.function.name, JSON.parse(call.function.arguments)], ["get_weather", { city: "Bergen" }]);
const told = [
  ...weather,
  { role: "assistant", content: null, tool_calls: [call] },
  { role: "tool", tool_call_id: call.id, content: "rain, 9 degrees" },
];
const answer = await client.chat.completions.create({ model, messages: told, tools: [tool], temperature: 0 });
assert.match(answer.choices[0].message.content, /rain/);

const schema = { type: "object", properties: { age: { type: "integer" } }, required: ["age"], additionalProperties: false };
const form = { type: "json_schema", json_schema: { name: "age", schema, strict: true } };
const formed = await client.chat.completions.create({ model, messages: sum, response_format: form, seed: 3 });
assert.deepEqual(Object.keys(JSON.parse(formed.choices[0].message.content)), ["age"]);

const response = await client.responses.create({ model, input: "What is 47 + 38?", temperature: 0 });
assert.match(response.output_text, /85/);
const events = [];
for await (const event of await client.responses.create({ model, input: "Who are you?", stream: true })) events.push(event.type);
assert.equal(events.at(-1), "response.completed");

const vectors = await client.embeddings.create({ model, input: ["a ship", "a song"] });
assert.equal(vectors.data.length, 2);
assert.ok(vectors.data[0].embedding.length > 10);
assert.deepEqual((await client.models.list()).data.map((one) => one.id), ["skald"]);

const file = await client.files.create({ file: await OpenAI.toFile(Buffer.from("{}\n"), "a.jsonl"), purpose: "batch" });
assert.equal(await (await client.files.content(file.id)).text(), "{}\n");

await assert.rejects(client.chat.completions.create({ model: "no", messages: sum }), OpenAI.NotFoundError);
await assert.rejects(
  client.chat.completions.create({ model, messages: sum, temperature: -1 }),
  (error) => error instanceof OpenAI.BadRequestError && error.param === "temperature",
);
const stranger = new OpenAI({ baseURL: `${url}/v1`, apiKey: "wrong", maxRetries: 0 });
await assert.rejects(stranger.models.list(), OpenAI.AuthenticationError);

const long = await client.completions.create({ model, prompt: "Once", max_tokens: 1900, ignore_eos: true, stream: true });
for await (const _ of long) break; // leaving the loop aborts the request
console.log("DONE");
