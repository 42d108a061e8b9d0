// onnxruntime-web (WebAssembly) under Node.
import { readFile } from "node:fs/promises";
import { dirname, join } from "node:path";
import { answer, installed, readPatchModule, request } from "./request.mjs";
import { answers } from "./sessions.mjs";

const [ort, version] = await installed("onnxruntime-web");
ort.env.wasm.numThreads = 1;
const graph = join(request.model, request.graph);
const externalData = [];
for (const path of request.external) externalData.push({ path, data: new Uint8Array(await readFile(join(dirname(graph), path))) });
const bytes = new Uint8Array(await readFile(graph));
const session = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"], externalData });
const patch = await readFile(join(request.folder, request.patch));
await answer({ version, ...(await answers(session, ort, await readPatchModule(), patch, request)) });
