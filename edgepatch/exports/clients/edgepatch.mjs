// Puts an edgepatch patch in front of everything that a decoder graph reads: onnxruntime-web, onnxruntime-node, transformers.js.
// No build step. The caller keeps handing over its own text and its own mask; cells, mask and positions of the patch are added here,
// so no mask can leave the patch out.

const MANIFEST = "edgepatch.manifest";
const FORMATS = [1, 2, 3];
const LEAST_TURN = 8; // tokens between two anchors at least
const CANARY_LIMIT = 0.5; // 0 is the patch's own effect, 1 is none, another patch's is 0.53 or more
const MAX_HEADER_BYTES = 1 << 20;
// A module of one function that uses a 128-bit value.
const SIMD = Uint8Array.of(0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11);

export class PatchError extends Error {
  name = "PatchError";
}

function require(holds, message) {
  if (!holds) throw new PatchError(message);
}

/** Throws where the browser has no WebAssembly SIMD, which onnxruntime-web cannot do without. */
export function requireSimd() {
  const holds = typeof WebAssembly === "object" && WebAssembly.validate(SIMD);
  require(holds, "WebAssembly SIMD: expected, found none; this browser cannot run the model: update it, or turn SIMD on");
}

/**
 * Reads a patch file.
 * @param {string|URL|ArrayBuffer|Uint8Array} source its address, or its bytes (in Node: `await readFile(...)`).
 * @param {string} sha256 of the file, in hexadecimal digits, as the README names it.
 */
export async function readPatch(source, sha256) {
  if (typeof document !== "undefined" || typeof importScripts === "function") requireSimd();
  const bytes = await bytesOf(source);
  require(/^[0-9a-f]{64}$/.test(sha256), "sha256: expected the 64 digits that the README names");
  require(globalThis.crypto?.subtle, "crypto.subtle: expected, found none: open the page over https or from localhost");
  const digest = [...new Uint8Array(await crypto.subtle.digest("SHA-256", bytes))];
  const found = digest.map((byte) => byte.toString(16).padStart(2, "0")).join("");
  require(found === sha256, `patch: expected SHA-256 ${sha256}, found ${found} of ${bytes.length} bytes; get the file again`);
  return new Patch(bytes);
}

async function bytesOf(source) {
  if (source instanceof ArrayBuffer) return new Uint8Array(source);
  if (ArrayBuffer.isView(source)) return new Uint8Array(source.buffer, source.byteOffset, source.byteLength);
  const reply = await fetch(source);
  require(reply.ok, `patch: ${source}: status ${reply.status}`);
  return new Uint8Array(await reply.arrayBuffer());
}

class Patch {
  constructor(bytes) {
    const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    const length = bytes.length < 8 ? 0 : Number(view.getBigUint64(0, true));
    require(length > 0 && length <= Math.min(MAX_HEADER_BYTES, bytes.length - 8), "patch: this is no safetensors file");
    const header = JSON.parse(new TextDecoder().decode(bytes.subarray(8, 8 + length)));
    const manifest = JSON.parse(header.__metadata__?.[MANIFEST] ?? "{}");
    require(FORMATS.includes(manifest.format_version), `patch: expected format ${FORMATS}, found ${manifest.format_version}`);
    Object.assign(this, { manifest, name: manifest.name, version: manifest.version, length: manifest.num_virtual_tokens });
    const { num_hidden_layers: layers, num_key_value_heads: heads, head_dim: width } = manifest.base;
    Object.assign(this, { layers, heads, width, anchoring: manifest.anchoring, rotation: manifest.rotation });
    const read = (name) => floatsOf(bytes.subarray(8 + length), header[name], [heads, this.length, width], name);
    this.keys = Array.from({ length: layers }, (_, i) => read(`past_key_values.${i}.key`));
    this.values = Array.from({ length: layers }, (_, i) => read(`past_key_values.${i}.value`));
  }

  /** Keys of a layer as they are `shift` positions further on. */
  keysAt(layer, shift) {
    const keys = this.keys[layer], table = this.rotation?.layers[layer];
    if (!shift || table == null) return keys;
    const turned = Float32Array.from(keys), frequencies = this.rotation.tables[table], count = frequencies.length;
    const [step, apart] = this.rotation.neighbours ? [2, 1] : [1, count];
    for (let j = 0; j < count; j++) {
      const cos = Math.cos(frequencies[j] * shift), sin = Math.sin(frequencies[j] * shift);
      for (let first = j * step; first < keys.length; first += this.width) {
        const second = first + apart;
        turned[first] = keys[first] * cos - keys[second] * sin;
        turned[second] = keys[second] * cos + keys[first] * sin;
      }
    }
    return turned;
  }

  /** The anchor of a text's token, from that of the token in front of it: the patch stands directly in front of it. */
  step(anchor, index, token) {
    if (!this.anchoring) return 0;
    const distance = index - anchor;
    const opensTurn = distance >= LEAST_TURN && this.anchoring.turn_tokens.includes(token);
    return distance === this.anchoring.block || opensTurn ? index : anchor;
  }

  /**
   * Puts the patch into a model and proves it; throws where it is not the model's.
   * @param model a session of onnxruntime, or a model of transformers.js, which is changed in place.
   * @param Tensor `ort.Tensor`, or that of transformers.js.
   * @param {{proof?: "first"|"all"}} options how many of the patch's own proofs are asked: the first alone is quick, and proves nothing of long texts.
   * @returns the patched session, or the model.
   */
  async install(model, Tensor, { proof = "all" } = {}) {
    const session = model.sessions?.model ?? model;
    require(typeof session.run === "function", "expected a session of onnxruntime or a decoder of transformers.js");
    require(!patched.has(session), "expected a model without a patch, found one that has one: load it again");
    const make = (type, data, dims) => {
      const tensor = new Tensor(type, data, dims);
      return tensor.ort_tensor ?? tensor; // transformers.js wraps those of onnxruntime
    };
    const wrapped = new PatchedSession(this, session, make);
    await wrapped.prove(proof === "first" ? 1 : this.manifest.canary?.prompts.length);
    if (model.sessions) model.sessions.model = wrapped.proxy;
    return model.sessions ? model : wrapped.proxy;
  }
}

const patched = new WeakSet(); // sessions that hold a patch

class PatchedSession {
  constructor(patch, session, make) {
    Object.assign(this, { patch, session, make, texts: new WeakMap() });
    const layers = Array.from({ length: patch.layers }, (_, i) => i);
    this.pairs = layers.flatMap((i) => ["key", "value"].map((kind) => [`past_key_values.${i}.${kind}`, `present.${i}.${kind}`]));
    this.requireGraph();
    const run = this.run.bind(this);
    this.proxy = new Proxy(session, {
      get(target, name) {
        if (name === "run") return run;
        const value = target[name];
        return typeof value === "function" ? value.bind(target) : value;
      },
    });
    patched.add(this.proxy);
  }

  requireGraph() {
    const { session, patch, pairs } = this, title = `${patch.name} ${patch.version}`;
    const past = session.inputNames.filter((name) => name.includes("past_key_values"));
    const isSame = past.length === pairs.length && pairs.every(([input, output]) => past.includes(input) && session.outputNames.includes(output));
    require(isSame, `graph: expected the ${patch.layers} layers that ${title} was made for, as past_key_values.N.key, found ${past.length / 2} of them`);
    for (const name of ["input_ids", "attention_mask"]) require(session.inputNames.includes(name), `graph: expected the input ${name}, found none`);
    const entries = session.inputMetadata ?? [];
    const first = entries.find(({ name }) => name === pairs[0][0]);
    const [, heads = patch.heads, , width = patch.width] = (first?.shape ?? []).map((size) => (typeof size === "number" && size > 0 ? size : undefined));
    require(heads === patch.heads && width === patch.width, `graph: expected ${patch.heads} heads of ${patch.width} for ${title}, found ${heads} of ${width}`);
    this.type = first?.type ?? "float32";
    require(["float32", "float16"].includes(this.type), `graph: expected a cache of float32 or float16, found ${this.type}`);
    this.others = session.inputNames.includes("num_logits_to_keep") ? { num_logits_to_keep: this.make("int64", BigInt64Array.of(0n), []) } : {};
  }

  /** Cells of the patch in front of a text. */
  seed() {
    const { layers, heads, length, width, keys, values } = this.patch, dims = [1, heads, length, width];
    const tensors = Array.from({ length: layers }, (_, i) => [keys[i], values[i]]).flat();
    return Object.fromEntries(this.pairs.map(([input], i) => [input, this.make(this.type, this.stored(tensors[i]), dims)]));
  }

  stored(floats) {
    return this.type === "float16" ? Uint16Array.from(floats, halfOf) : Float32Array.from(floats);
  }

  /** As a session's own: feeds and outputs are those of the text alone, but that the cache holds the patch as well. */
  async run(feeds, ...rest) {
    const ids = feeds.input_ids, past = feeds[this.pairs[0][0]];
    require(ids?.dims.length === 2 && ids.dims[0] === 1, `input_ids: expected one text, found ${ids?.dims[0] ?? 0} of them`);
    const isNew = !past?.dims[2];
    const text = isNew ? { tokens: [], anchor: 0, place: 0 } : this.texts.get(past);
    require(text, "past_key_values: expected none, or those that this patched model has given back, found others");
    const tokens = [...text.tokens, ...Array.from(ids.data, Number)];
    this.requireMask(feeds.attention_mask, tokens.length);
    let cells = isNew ? this.seed() : Object.fromEntries(this.pairs.map(([input]) => [input, feeds[input]]));
    let outputs, state = text;
    const logits = [];
    for (const span of this.spans(tokens, text.tokens.length, text.anchor)) {
      if (span.anchor !== state.place) await this.move(cells, state, span.anchor);
      outputs = await this.session.run({ ...this.feeds(feeds, tokens, span), ...cells }, ...rest);
      logits.push(outputs.logits);
      cells = Object.fromEntries(this.pairs.map(([input, output]) => [input, outputs[output]]));
      state = { tokens: tokens.slice(0, span.end), anchor: span.anchor, place: span.anchor };
    }
    this.texts.set(cells[this.pairs[0][0]], state);
    return logits.length > 1 ? { ...outputs, logits: await this.joined(logits) } : outputs;
  }

  requireMask(mask, length) {
    if (!mask) return;
    const isWhole = mask.dims[1] === length || mask.dims[1] === length + this.patch.length;
    require(isWhole, `attention_mask: expected ${length} places, one for each token of the text so far, found ${mask.dims[1]}; hand over a conversation whole, without past_key_values`);
    require(mask.data.every((one) => Number(one) === 1), "attention_mask: expected ones, found a zero: padding cannot stand behind a patch");
  }

  /** Tokens from `first` on, divided where the patch moves; `anchor` is that of the token in front. */
  *spans(tokens, first, anchor) {
    let start = first;
    for (let i = Math.max(first, 1); i < tokens.length; i++) {
      const next = this.patch.step(anchor, i, tokens[i]);
      if (next !== anchor && i > start) {
        yield { start, end: i, anchor };
        start = i;
      }
      anchor = next;
    }
    if (start < tokens.length) yield { start, end: tokens.length, anchor };
  }

  /** What the graph gets for a span, the patch's own places counted in; whatever else the caller feeds is passed on. */
  feeds(given, tokens, { start, end }) {
    const { length } = this.patch, numbers = (count, at) => BigInt64Array.from({ length: count }, (_, i) => BigInt(at(i)));
    const ours = {
      input_ids: this.make("int64", numbers(end - start, (i) => tokens[start + i]), [1, end - start]),
      attention_mask: this.make("int64", numbers(length + end, () => 1), [1, length + end]),
      position_ids: this.make("int64", numbers(end - start, (i) => length + start + i), [1, end - start]),
    };
    const names = this.session.inputNames.filter((name) => !name.startsWith("past_key_values"));
    const others = { ...this.others, ...given };
    return Object.fromEntries(names.map((name) => [name, ours[name] ?? others[name]]));
  }

  /** Puts other keys of the patch in the place of those that are there. */
  async move(cells, state, anchor) {
    const { heads, length, width } = this.patch;
    for (let layer = 0; layer < this.patch.layers; layer++) {
      const [name] = this.pairs[2 * layer], tensor = cells[name];
      const data = await dataOf(tensor), keys = this.stored(this.patch.keysAt(layer, anchor));
      const bits = this.type === "float16" ? new Uint16Array(data.buffer, data.byteOffset, data.length) : data;
      for (let head = 0; head < heads; head++) {
        bits.set(keys.subarray(head * length * width, (head + 1) * length * width), head * tensor.dims[2] * width);
      }
      if (!isOnCpu(tensor)) cells[name] = this.make(this.type, data, tensor.dims);
    }
    if (isOnCpu(cells[this.pairs[1][0]])) state.place = anchor; // the caller's own cache has changed with it
  }

  async joined(parts) {
    const datas = await Promise.all(parts.map(dataOf)), joined = new datas[0].constructor(datas.reduce((sum, data) => sum + data.length, 0));
    datas.reduce((offset, data) => (joined.set(data, offset), offset + data.length), 0);
    const { type, dims } = parts[0], count = parts.reduce((sum, part) => sum + part.dims[1], 0);
    return new parts[0].constructor(type, joined, [1, count, dims[2]]); // of the class that the caller knows its outputs by
  }

  /** The patch's own proof: with it, the model must do what the full-precision model does with it. */
  async prove(count) {
    const { name, version, manifest, heads, width } = this.patch, title = `${name} ${version}`;
    const prompts = manifest.canary?.prompts.slice(0, count) ?? [];
    require(prompts.length, `${title}: expected a canary, found none: nothing would prove that it acts`);
    for (const prompt of prompts) {
      const tokens = prompt.tokens, span = { start: 0, end: tokens.length };
      const feeds = this.feeds({}, tokens, span), empty = new (this.type === "float16" ? Uint16Array : Float32Array)(0);
      const past = Object.fromEntries(this.pairs.map(([input]) => [input, this.make(this.type, empty, [1, heads, 0, width])]));
      const ones = this.make("int64", new BigInt64Array(tokens.length).fill(1n), [1, tokens.length]);
      const places = this.make("int64", BigInt64Array.from(tokens, (_, i) => BigInt(i)), [1, tokens.length]);
      const own = { ...feeds, attention_mask: ones, ...("position_ids" in feeds && { position_ids: places }), ...past };
      const bare = await this.session.run(own), withPatch = await this.run({ input_ids: feeds.input_ids });
      const effect = await differences(withPatch.logits, bare.logits, prompt.token_ids);
      const expected = prompt.patched.map((value, i) => value - prompt.bare[i]);
      const deviation = norm(effect.map((value, i) => value - expected[i])) / norm(expected);
      require(deviation <= CANARY_LIMIT, `${title}: its effect on this model deviates by ${deviation.toFixed(2)}, at most ${CANARY_LIMIT} is allowed: it was made for another model`);
    }
  }
}

/** By how much the last row's logits of some tokens differ, less what they have in common. */
async function differences(patchedLogits, bareLogits, ids) {
  const [after, before] = await Promise.all([patchedLogits, bareLogits].map((logits) => lastRow(logits, ids)));
  const gaps = after.map((value, i) => value - before[i]), mean = gaps.reduce((sum, gap) => sum + gap, 0) / gaps.length;
  return gaps.map((gap) => gap - mean);
}

async function lastRow(logits, ids) {
  const data = await dataOf(logits), start = data.length - logits.dims.at(-1);
  return ids.map((id) => (data instanceof Uint16Array ? floatOf(data[start + id]) : Number(data[start + id])));
}

function norm(values) {
  return Math.sqrt(values.reduce((sum, value) => sum + value * value, 0));
}

function isOnCpu(tensor) {
  return ["cpu", "cpu-pinned", undefined].includes(tensor.location);
}

async function dataOf(tensor) {
  return isOnCpu(tensor) ? tensor.data : tensor.getData();
}

/** A tensor of a safetensors file as float32. */
function floatsOf(data, entry, shape, name) {
  require(entry && String(entry.shape) === String(shape), `patch: ${name}: expected ${shape}, found ${entry?.shape}; it has no stored seed`);
  const part = data.slice(...entry.data_offsets), count = shape.reduce((product, size) => product * size, 1);
  require(part.length === count * { F16: 2, F32: 4 }[entry.dtype], `patch: ${name}: expected ${count} values, found ${part.length} bytes of ${entry.dtype}`);
  return entry.dtype === "F32" ? new Float32Array(part.buffer) : floatsFrom(new Uint16Array(part.buffer));
}

/** float16, given as bits, as float32: all but the smallest and the largest keep their bits. */
function floatsFrom(halves) {
  // The browser's own conversion takes a tenth of the loop, which runs once, before it is compiled.
  if (typeof Float16Array === "function") return new Float32Array(new Float16Array(halves.buffer, halves.byteOffset, halves.length));
  const floats = new Float32Array(halves.length), bits = new Uint32Array(floats.buffer);
  for (let i = 0; i < halves.length; i++) {
    const half = halves[i], exponent = (half >> 10) & 31;
    if (exponent && exponent < 31) bits[i] = ((half & 0x8000) << 16) | ((exponent + 112) << 23) | ((half & 1023) << 13);
    else floats[i] = floatOf(half);
  }
  return floats;
}

function floatOf(half) {
  const sign = half & 0x8000 ? -1 : 1, exponent = (half >> 10) & 31, fraction = half & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024));
}

const single = new Float32Array(1), singleBits = new Uint32Array(single.buffer);

/** The nearest float16 of a float32, as its bits; of two the even one. */
function halfOf(value) {
  single[0] = value;
  const bits = singleBits[0], sign = (bits >>> 16) & 0x8000, exponent = ((bits >>> 23) & 255) - 112, fraction = bits & 0x7fffff;
  if (exponent >= 31) return sign | 0x7c00;
  if (exponent < -10) return sign;
  const [whole, shift] = exponent > 0 ? [(exponent << 23) | fraction, 13] : [fraction | 0x800000, 14 - exponent];
  const half = whole >>> shift, rest = whole & ((1 << shift) - 1), middle = 1 << (shift - 1);
  return sign | (half + (rest > middle || (rest === middle && half & 1) ? 1 : 0));
}
