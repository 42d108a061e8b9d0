// The request that a program here gets, and where its answer goes; the last line that it complains with is the reason.
import { readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

process.on("uncaughtException", (error) => {
  console.error(`${error.name}: ${String(error.message).replaceAll("\n", " ")}`);
  process.exit(1);
});

export const request = JSON.parse(await readFile(process.argv[2], "utf8"));

/** A module from where the client is installed, and its version. */
export async function installed(name) {
  const home = pathToFileURL(join(request.client, "/"));
  const { version } = JSON.parse(await readFile(join(request.client, "node_modules", name, "package.json"), "utf8"));
  return [await import(import.meta.resolve(name, home)), version];
}

export async function readPatchModule() {
  return (await import(pathToFileURL(join(request.folder, "edgepatch.mjs")))).readPatch;
}

export async function answer(value) {
  await writeFile(request.answer, JSON.stringify(value));
  process.exit(0);
}
