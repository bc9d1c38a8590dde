/** Vectors of texts, from the library of an embedding model. */

import type { EmbedOptions } from "./qcc";
import { QccError } from "./errors";
import type { Json, Tokenizer } from "./tokenizer";

const LEAST_LENGTH = 1e-12; // of a vector that is made one of length 1

/** What computes, and its sizes: tokens of a text, tokens and texts of a pass, numbers. */
export interface Encoder {
  readonly limits: { window: number; chunk: number; batch: number; dimensions: number };
  /** Texts one behind the other, each up to ends[i] -> float32[b * dimensions]. */
  encode(tokens: Int32Array, ends: Int32Array): Promise<Float32Array>;
}

interface Usage {
  prompts: Record<string, string>;
  default_prompt: string | null;
  lower_case: boolean;
}

/** A vector of each text. */
export async function embed(
  encoder: Encoder, tokenizer: Tokenizer, chat: Json, texts: string[], options: EmbedOptions,
): Promise<Float32Array[]> {
  const { dimensions } = encoder.limits;
  const wanted = options.dimensions ?? dimensions;
  if (!(Number.isInteger(wanted) && wanted >= 1 && wanted <= dimensions)) {
    throw new QccError(`dimensions ${wanted}: the model has 1 to ${dimensions}`);
  }
  const usage = chat.embedding as Usage;
  const prompt = promptOf(usage, options.promptName);
  const tokens = texts.map((text, index) => {
    const whole = usage.lower_case ? (prompt + text).toLowerCase() : prompt + text;
    const { ids, count } = tokenizer.encodeWithin(whole, encoder.limits.window);
    if (count > ids.length && options.truncate === false) {
      throw new QccError(
        `text ${index + 1} has ${count} tokens, the window is ${encoder.limits.window}`,
      );
    }
    return ids;
  });
  const vectors: Float32Array[] = [];
  for (const pass of passes(tokens, encoder.limits)) {
    options.signal?.throwIfAborted();
    let end = 0;
    const ends = Int32Array.from(pass, (ids) => (end += ids.length));
    const found = await encoder.encode(Int32Array.from(pass.flat()), ends);
    for (let i = 0; i < pass.length; i++) {
      const vector = found.slice(i * dimensions, i * dimensions + wanted);
      vectors.push(wanted === dimensions ? vector : unit(vector));
    }
  }
  return vectors;
}

/** What goes before a text; without a name: the model's default, if it has one. */
function promptOf(usage: Usage, name: string | undefined): string {
  const chosen = name ?? usage.default_prompt;
  if (chosen === null) return "";
  const found = usage.prompts[chosen];
  if (found !== undefined) return found;
  const known = Object.keys(usage.prompts).join(", ") || "no prompts";
  throw new QccError(`prompt ${chosen}: the model has ${known}`);
}

/** Texts in order, as many at a time as fit. */
function passes(texts: number[][], limits: Encoder["limits"]): number[][][] {
  const found: number[][][] = [];
  let used = Infinity;
  for (const ids of texts) {
    if (used + ids.length > limits.chunk || found.at(-1)!.length === limits.batch) {
      found.push([]);
      used = 0;
    }
    found.at(-1)!.push(ids);
    used += ids.length;
  }
  return found;
}

function unit(vector: Float32Array): Float32Array {
  const length = Math.sqrt(vector.reduce((sum, x) => sum + x * x, 0));
  return vector.map((x) => x / Math.max(length, LEAST_LENGTH));
}
