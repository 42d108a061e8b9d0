// Greedy replies of a session of onnxruntime with a patch in it: what the check of an export compares.

const ROUNDS = 9;

function int64(ort, values, dims) {
  return new ort.Tensor("int64", BigInt64Array.from(values, BigInt), dims);
}

function likeliest(row) {
  let best = 0;
  for (let i = 1; i < row.length; i++) if (row[i] > row[best]) best = i;
  return best;
}

/** The tokens behind a prompt, and the logits of the first of them. It feeds the text's own cells and mask alone, as without a patch. */
async function reply(session, ort, { num_key_value_heads: heads, head_dim: width }, prompt, count) {
  const names = session.inputNames.filter((name) => name.startsWith("past_key_values."));
  let past = Object.fromEntries(names.map((name) => [name, new ort.Tensor("float32", new Float32Array(0), [1, heads, 0, width])]));
  let fed = prompt, length = 0, logits;
  const tokens = [];
  while (tokens.length < count) {
    length += fed.length;
    const feeds = { input_ids: int64(ort, fed, [1, fed.length]), attention_mask: int64(ort, Array(length).fill(1), [1, length]), ...past };
    if (session.inputNames.includes("position_ids")) feeds.position_ids = int64(ort, fed.map((_, i) => length - fed.length + i), [1, fed.length]);
    const outputs = await session.run(feeds);
    const row = outputs.logits.data.slice(-outputs.logits.dims.at(-1));
    logits ??= Array.from(row);
    fed = [likeliest(row)];
    tokens.push(fed[0]);
    past = Object.fromEntries(names.map((name) => [name, outputs[name.replace("past_key_values", "present")]]));
  }
  return { prompt, tokens, logits };
}

/** How many times as long as bare the first token of a prompt takes patched: the median of both, asked in turns. */
async function firstTokenRatio(bare, patched, ort, base, prompt) {
  const taken = new Map([[bare, []], [patched, []]]);
  for (let round = 0; round <= ROUNDS; round++) {
    for (const [session, times] of taken) {
      const start = performance.now();
      await reply(session, ort, base, prompt, 1);
      if (round) times.push(performance.now() - start); // the first warms up
    }
  }
  const [before, after] = [...taken.values()].map((times) => times.sort((a, b) => a - b)[ROUNDS >> 1]);
  return after / before;
}

/** What the patched session answers, how long the patch took to load, its proof left out, and what it costs the first token. */
export async function answers(session, ort, readPatch, source, request) {
  const start = performance.now();
  const patch = await readPatch(source, request.sha256);
  const load_ms = performance.now() - start;
  const patched = await patch.install(session, ort.Tensor, { proof: request.proof });
  const replies = [];
  for (const prompt of request.prompts) replies.push(await reply(patched, ort, request.base, prompt, request.count));
  const first_token_ratio = await firstTokenRatio(session, patched, ort, request.base, request.prompts[0]);
  return { replies, load_ms, first_token_ratio };
}
