// transformers.js under Node: its own `generate`, with the mask that a tokenizer gives, after the patch was installed.
import { readFile } from "node:fs/promises";
import { basename, dirname, join } from "node:path";
import { answer, installed, readPatchModule, request } from "./request.mjs";

const [transformers, version] = await installed("@huggingface/transformers");
const { AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList, Tensor, env } = transformers;
Object.assign(env, { allowRemoteModels: false, allowLocalModels: true, localModelPath: dirname(request.model) });
const subfolder = request.graph.includes("/") ? dirname(request.graph) : "", model_file_name = basename(request.graph, ".onnx");
const options = { dtype: "fp32", device: "cpu", subfolder, model_file_name, session_options: { intraOpNumThreads: 1 } };
const model = await AutoModelForCausalLM.from_pretrained(basename(request.model), options);

class FirstLogits extends LogitsProcessor {
  _call(ids, logits) {
    this.logits ??= Array.from(logits.data);
    return logits;
  }
}

async function reply(prompt) {
  const ids = (value) => new Tensor("int64", BigInt64Array.from(prompt, value), [1, prompt.length]);
  const first = new FirstLogits(), logits_processor = new LogitsProcessorList();
  logits_processor.push(first);
  const lengths = { max_new_tokens: request.count, min_new_tokens: request.count, eos_token_id: -1 };
  const output = await model.generate({ input_ids: ids(BigInt), attention_mask: ids(() => 1n), do_sample: false, ...lengths, logits_processor });
  return { prompt, tokens: Array.from(output.data.slice(prompt.length), Number), logits: first.logits };
}

const readPatch = await readPatchModule(), start = performance.now();
const patch = await readPatch(await readFile(join(request.folder, request.patch)), request.sha256);
const load_ms = performance.now() - start;
await patch.install(model, Tensor, { proof: request.proof });
const replies = [];
for (const prompt of request.prompts) replies.push(await reply(prompt));
await answer({ version, replies, load_ms });
