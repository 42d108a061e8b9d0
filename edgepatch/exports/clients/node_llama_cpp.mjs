// node-llama-cpp: its sequences as they are, or its unmodified LlamaChatSession.
import { join } from "node:path";
import { answer, installed, request } from "./request.mjs";

const [{ getLlama, LlamaChatSession, LlamaLogLevel }, version] = await installed("node-llama-cpp");
const llama = await getLlama({ build: "never", gpu: false, logLevel: LlamaLogLevel.error });
const model = await llama.loadModel({ modelPath: request.model });
const context = await model.createContext({ contextSize: request.context.cells, flashAttention: request.context.flash_attention, threads: 1 });
const sequence = context.getSequence(), times = [];
if (typeof sequence.loadStateFromFile !== "function") throw new Error(`node-llama-cpp ${version}: expected sequences that load a state, found none; update it`);

async function restore() {
  const start = performance.now();
  await sequence.loadStateFromFile(join(request.folder, request.seed), { acceptRisk: true });
  times.push(performance.now() - start);
}

async function reply(prompt) {
  await restore();
  const held = sequence.contextTokens.length, tokens = [];
  if (held !== 1 || sequence.contextTokens[0] !== prompt[0]) throw new Error(`expected the label of the seed, found ${held} tokens`);
  for await (const token of sequence.evaluate(prompt.slice(1), { temperature: 0, yieldEogToken: true })) {
    tokens.push(token);
    if (tokens.length === request.count) break;
  }
  return { prompt, tokens };
}

async function chat(text) {
  await restore();
  const session = new LlamaChatSession({ contextSequence: sequence });
  let tokens = [];
  await session.prompt(text, { maxTokens: request.count, temperature: 0, trimWhitespaceSuffix: false, onToken: (more) => { tokens = tokens.concat(more); } });
  const all = Array.from(sequence.contextTokens), at = all.findLastIndex((_, i) => tokens.slice(0, -1).every((token, j) => all[i + j] === token));
  if (at < 1) throw new Error("the reply is not in the context");
  const prompt = all.slice(0, at);
  session.dispose({ disposeSequence: false });
  return { prompt, tokens };
}

const isChat = request.name === "LlamaChatSession", replies = [];
for (const prompt of isChat ? request.texts : request.prompts) replies.push(await (isChat ? chat : reply)(prompt));
await answer({ version, replies, load_ms: Math.min(...times) });
