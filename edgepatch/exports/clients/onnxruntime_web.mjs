// onnxruntime-web (WebAssembly) under Node.
import { existsSync } from "node:fs";
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { answer, installed, readPatchModule, request } from "./request.mjs";
import { answers } from "./sessions.mjs";

const [ort, version] = await installed("onnxruntime-web");
ort.env.wasm.numThreads = 1;
const data = join(request.model, "model.onnx.data");
const externalData = existsSync(data) ? [{ path: "model.onnx.data", data: new Uint8Array(await readFile(data)) }] : [];
const graph = new Uint8Array(await readFile(join(request.model, "model.onnx")));
const session = await ort.InferenceSession.create(graph, { executionProviders: ["wasm"], externalData });
const patch = await readFile(join(request.folder, request.patch));
await answer({ version, ...(await answers(session, ort, await readPatchModule(), patch, request)) });
