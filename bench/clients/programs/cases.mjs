// What the Node programs share, as cases.py.
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { z } from "zod";

export const { OPENAI_BASE_URL: URL, OPENAI_API_KEY: KEY, EDGEPATCH_MODEL: MODEL } = process.env;
export const QUESTION = "What is the capital of Italy?";
export const TOWNS = ["Rome", "Ulm"];
export const Answer = z.object({ town: z.enum(TOWNS), is_sure: z.boolean() });
export const Weather = z.object({ town: z.enum(TOWNS) });
const MAX_NOTE = 300;

export function require(holds, what) {
  if (!holds) throw new Error(what);
}

export async function run(client, cases) {
  const { version } = JSON.parse(readFileSync(join("node_modules", client, "package.json")));
  for (const [name, check] of Object.entries(cases)) {
    let [verdict, note] = ["pass", ""];
    try {
      await check();
    } catch (error) {
      [verdict, note] = ["fail", `${error.name}: ${error.message}`.slice(0, MAX_NOTE)];
    }
    console.log(JSON.stringify({ client: `node:${client}`, version, case: name, verdict, note }));
  }
}
