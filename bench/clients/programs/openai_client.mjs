// Node's openai: chat, streams, parsing, tools and back, responses.
import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { Answer, MODEL, QUESTION, TOWNS, require, run } from "./cases.mjs";

const client = new OpenAI({ timeout: 120_000 });
const messages = [{ role: "user", content: QUESTION }];
const parameters = {
  type: "object",
  properties: { town: { enum: TOWNS } },
  required: ["town"],
  additionalProperties: false,
};
const weather = { name: "get_weather", description: "The weather of a town.", parameters };

await run("openai", {
  async chat() {
    const reply = await client.chat.completions.create({ model: MODEL, messages, max_tokens: 16 });
    require(reply.choices[0].message.content, "no text");
    const turns = [...messages, reply.choices[0].message, { role: "user", content: "And of France?" }];
    await client.chat.completions.create({ model: MODEL, messages: turns, max_tokens: 4 });
  },
  async stream() {
    let text = "";
    for await (const chunk of await client.chat.completions.create({ model: MODEL, messages, max_tokens: 16, stream: true }))
      text += chunk.choices[0]?.delta?.content ?? "";
    require(text, "no text");
  },
  async stream_helper() {
    const stream = client.chat.completions.stream({ model: MODEL, messages, max_tokens: 16 });
    require(await stream.finalContent(), "no text");
  },
  async parse() {
    const response_format = zodResponseFormat(Answer, "answer");
    const reply = await client.chat.completions.parse({ model: MODEL, messages, response_format, max_tokens: 60 });
    require(TOWNS.includes(reply.choices[0].message.parsed.town), "not parsed");
    await client.chat.completions.create({ model: MODEL, messages: [...messages, reply.choices[0].message, ...messages], max_tokens: 4 });
  },
  async tools() {
    const asked = { model: MODEL, tools: [{ type: "function", function: weather }], max_tokens: 60 };
    const { message } = (await client.chat.completions.create({ ...asked, messages, tool_choice: "required" })).choices[0];
    const [call] = message.tool_calls;
    require(TOWNS.includes(JSON.parse(call.function.arguments).town), "no call");
    const result = { role: "tool", tool_call_id: call.id, content: "rain" };
    await client.chat.completions.create({ ...asked, messages: [...messages, message, result], tool_choice: "none" });
  },
  async responses() {
    const first = await client.responses.create({ model: MODEL, input: QUESTION, max_output_tokens: 16 });
    require(first.output_text, "no text");
    const input = [...messages, ...first.output, { role: "user", content: "And of France?" }];
    await client.responses.create({ model: MODEL, input, max_output_tokens: 4 });
  },
  async responses_stream() {
    const kinds = [];
    for await (const event of await client.responses.create({ model: MODEL, input: QUESTION, max_output_tokens: 16, stream: true }))
      kinds.push(event.type);
    require(kinds.includes("response.output_text.delta"), `events ${kinds}`);
  },
  async responses_parse() {
    const text = { format: zodTextFormat(Answer, "answer") };
    const reply = await client.responses.parse({ model: MODEL, input: QUESTION, text, max_output_tokens: 60 });
    require(TOWNS.includes(reply.output_parsed.town), "not parsed");
  },
  async responses_tools() {
    const asked = { model: MODEL, tools: [{ type: "function", ...weather, strict: true }], max_output_tokens: 60 };
    const reply = await client.responses.create({ ...asked, input: QUESTION, tool_choice: "required" });
    const [call] = reply.output;
    const result = { type: "function_call_output", call_id: call.call_id, output: "rain" };
    await client.responses.create({ ...asked, input: [...messages, call, result], tool_choice: "none" });
  },
});
