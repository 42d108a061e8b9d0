// Vercel's AI SDK, by OpenAI's own provider, which speaks /v1/responses.
import { createOpenAI } from "@ai-sdk/openai";
import { Output, generateText, streamText, tool } from "ai";
import { Answer, KEY, MODEL, QUESTION, TOWNS, URL, Weather, require, run } from "./cases.mjs";

const provider = createOpenAI({ baseURL: URL, apiKey: KEY });
const asked = { model: provider(MODEL), prompt: QUESTION, maxOutputTokens: 60, maxRetries: 0 };

await run("@ai-sdk/openai", {
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
    const get_weather = tool({ description: "The weather of a town.", inputSchema: Weather });
    const { toolCalls } = await generateText({ ...asked, tools: { get_weather }, toolChoice: "required" });
    require(TOWNS.includes(toolCalls[0].input.town), "no call");
  },
});
