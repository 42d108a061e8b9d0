// Vercel's AI SDK, by its provider for compatible servers.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { Output, generateText, stepCountIs, streamText, tool } from "ai";
import { Answer, KEY, MODEL, QUESTION, TOWNS, URL, Weather, require, run } from "./cases.mjs";

const provider = createOpenAICompatible({
  name: "edgepatch",
  baseURL: URL,
  apiKey: KEY,
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const asked = { model: provider(MODEL), prompt: QUESTION, maxOutputTokens: 60, maxRetries: 0 };
const get_weather = tool({
  description: "The weather of a town.",
  inputSchema: Weather,
  execute: async ({ town }) => `It rains in ${town}.`,
});

await run("@ai-sdk/openai-compatible", {
  async generateText() {
    require((await generateText(asked)).text, "no text");
  },
  async streamText() {
    let text = "";
    for await (const part of streamText(asked).textStream) text += part;
    require(text, "no text");
  },
  async structured() {
    const { output } = await generateText({ ...asked, output: Output.object({ schema: Answer }) });
    require(TOWNS.includes(output.town), "not parsed");
  },
  async tools() {
    const { toolCalls } = await generateText({ ...asked, tools: { get_weather }, toolChoice: "required" });
    require(TOWNS.includes(toolCalls[0].input.town), "no call");
  },
  async tools_stream() {
    const calls = [];
    for await (const part of streamText({ ...asked, tools: { get_weather }, toolChoice: "required" }).fullStream)
      if (part.type === "tool-call") calls.push(part);
    require(calls.length === 1 && TOWNS.includes(calls[0].input.town), `calls ${JSON.stringify(calls)}`);
  },
  async round_trip() {
    const prepareStep = ({ stepNumber }) => ({ toolChoice: stepNumber ? "none" : "required" });
    const { steps } = await generateText({ ...asked, tools: { get_weather }, stopWhen: stepCountIs(2), prepareStep });
    require(steps.length === 2 && steps[1].text, `steps ${steps.length}`);
  },
});
