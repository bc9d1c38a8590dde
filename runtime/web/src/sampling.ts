/**
 * How a token is chosen from one row of logits: the rules of qcc's Python runtime, bit for bit.
 *
 * Order: presence and frequency penalties, repetition penalty, logit bias, temperature, top-k,
 * top-p, min-p, one draw. The same seed and settings choose the same tokens of the same logits.
 */

import type { SamplingOptions } from "./qcc";
import { QccError } from "./errors";
import { exp, maximum, pairwiseSum, searchSorted, sum } from "./numerics";
import { Generator } from "./random";

const BLOCK = 1024; // numbers that are summed one by one
const TINY_TEMPERATURE = Math.fround(1e-30);

/** What a user asks of an answer, checked. */
export interface SamplingParams {
  max_tokens: number | undefined;
  temperature: number;
  top_k: number;
  top_p: number;
  min_p: number;
  repetition_penalty: number;
  presence_penalty: number;
  frequency_penalty: number;
  logit_bias: Map<number, number>;
  seed: number | bigint | undefined;
  stop: string[];
  stop_token_ids: number[];
  include_stop: boolean;
  ignore_eos: boolean;
}

const OFF: SamplingParams = {
  max_tokens: undefined,
  temperature: 1,
  top_k: 0,
  top_p: 1,
  min_p: 0,
  repetition_penalty: 1,
  presence_penalty: 0,
  frequency_penalty: 0,
  logit_bias: new Map(),
  seed: undefined,
  stop: [],
  stop_token_ids: [],
  include_stop: false,
  ignore_eos: false,
};

/** Options over defaults, each value checked; an unknown name is an error. */
export function samplingParams(
  options: SamplingOptions, defaults: SamplingOptions = {},
): SamplingParams {
  const given: Record<string, unknown> = { ...OFF };
  for (const [name, value] of [...Object.entries(defaults), ...Object.entries(options)]) {
    if (!(name in OFF)) {
      throw new QccError(`no option ${name}; there are ${Object.keys(OFF).join(", ")}`);
    }
    if (value !== undefined && value !== null) given[name] = value;
  }
  if (typeof given.stop === "string") given.stop = [given.stop];
  if (!(given.logit_bias instanceof Map)) {
    const entries = Object.entries(given.logit_bias as object);
    given.logit_bias = new Map(entries.map(([token, bias]) => [Number(token), bias]));
  }
  const params = given as unknown as SamplingParams;
  check(params);
  return params;
}

function check(p: SamplingParams): void {
  if (p.max_tokens !== undefined) whole("max_tokens", p.max_tokens, 0);
  whole("top_k", p.top_k, -1);
  if (p.seed !== undefined) whole("seed", p.seed, 0);
  number("temperature", p.temperature, 0, Infinity, "0 (greedy) or more");
  number("top_p", p.top_p, 0, 1, "above 0, at most 1");
  if (p.top_p === 0) {
    throw new QccError("top_p 0: must be above 0, at most 1; for greedy use temperature 0");
  }
  number("min_p", p.min_p, 0, 1, "0 to 1");
  number("repetition_penalty", p.repetition_penalty, 0, Infinity, "above 0");
  if (p.repetition_penalty === 0) {
    throw new QccError("repetition_penalty 0: must be above 0 (1 is off)");
  }
  number("presence_penalty", p.presence_penalty, -2, 2, "-2 to 2");
  number("frequency_penalty", p.frequency_penalty, -2, 2, "-2 to 2");
  for (const [token, bias] of p.logit_bias) {
    whole("logit_bias: token", token, 0);
    if (typeof bias !== "number" || Number.isNaN(bias) || bias === Infinity) {
      throw new QccError(`logit_bias of token ${token}: ${bias} is no number below infinity`);
    }
  }
  for (const token of p.stop_token_ids) whole("stop_token_ids: token", token, 0);
  for (const text of p.stop) {
    if (typeof text !== "string" || !text) {
      throw new QccError(`stop ${JSON.stringify(text)}: must be a text of a character or more`);
    }
  }
}

function whole(name: string, value: unknown, least: number): void {
  const fits = typeof value === "bigint" || Number.isSafeInteger(value);
  if (!fits || (value as number) < least) {
    throw new QccError(`${name} ${value}: must be a whole number of ${least} or more`);
  }
}

function number(name: string, value: unknown, low: number, high: number, allowed: string): void {
  if (typeof value !== "number" || !Number.isFinite(value) || value < low || value > high) {
    throw new QccError(`${name} ${value}: must be ${allowed}`);
  }
}

/** Chooses the tokens of one answer. */
export class Sampler {
  private readonly generator: Generator;
  private readonly counts = new Map<number, number>(); // of the answer's tokens
  private readonly seen: Set<number>;

  /** `prompt` counts as seen for the repetition penalty only. */
  constructor(
    private readonly params: SamplingParams, prompt: Iterable<number>, vocabulary: number,
  ) {
    this.generator = new Generator(params.seed);
    this.seen = new Set(prompt);
    for (const token of params.logit_bias.keys()) {
      if (token >= vocabulary) {
        throw new QccError(
          `logit_bias: token ${token} is not below the vocabulary ${vocabulary}`,
        );
      }
    }
  }

  /** The next token of float32[V], which is changed by penalties and biases. */
  choose(logits: Float32Array): number {
    if (!Number.isFinite(maximum(logits))) {
      throw new QccError(
        "the model computed logits that are not finite; the weights or the library are damaged, " +
          "or the GPU's driver fails: compile and package the model again",
      );
    }
    this.penalize(logits);
    const token = this.params.temperature === 0 ? argmax(logits) : this.draw(logits);
    this.counts.set(token, (this.counts.get(token) ?? 0) + 1);
    this.seen.add(token);
    return token;
  }

  private penalize(logits: Float32Array): void {
    const p = this.params;
    if (p.presence_penalty || p.frequency_penalty) {
      for (const [token, count] of this.counts) {
        logits[token]! -= p.presence_penalty + p.frequency_penalty * count;
      }
    }
    if (p.repetition_penalty !== 1) {
      const penalty = Math.fround(p.repetition_penalty);
      for (const token of this.seen) {
        const old = logits[token]!;
        logits[token] = old < 0 ? old * penalty : old / penalty;
      }
    }
    for (const [token, bias] of p.logit_bias) logits[token]! += Math.fround(bias);
  }

  private draw(logits: Float32Array): number {
    const p = this.params;
    const { ids, probs } = candidates(logits, p.temperature, p.top_k, p.top_p, p.min_p);
    return ids[pick(probs, this.generator.random())]!;
  }
}

/** The first index of the largest number. */
export function argmax(values: Float32Array): number {
  let best = 0;
  for (let i = 1; i < values.length; i++) if (values[i]! > values[best]!) best = i;
  return best;
}

/** Token ids, ascending, and their probabilities up to a common factor: c >= 1 of each. */
export interface Candidates {
  ids: Int32Array;
  probs: Float32Array;
}

/**
 * What top-k, top-p and min-p leave of float32[V]: what ties with the k-th stays; top-p keeps the
 * fewest of the likeliest that together reach p; min-p what has that share of the best.
 */
export function candidates(
  logits: Float32Array, temperature: number, topK: number, topP: number, minP: number,
): Candidates {
  let ids = indices(logits.length);
  if (topK > 0 && topK < logits.length) {
    const least = logits.slice().sort()[logits.length - topK]!;
    ids = ids.filter((id) => logits[id]! >= least);
  }
  const best = maximum(logits);
  const heat = Math.max(Math.fround(temperature), TINY_TEMPERATURE);
  let probs = new Float32Array(ids.length);
  for (let i = 0; i < ids.length; i++) {
    probs[i] = exp(Math.fround(Math.fround(logits[ids[i]!]! - best) / heat));
  }
  const keep = (kept: Int32Array): void => {
    ids = kept.map((i) => ids[i]!);
    probs = Float32Array.from(kept, (i) => probs[i]!);
  };
  if (topP < 1) keep(nucleus(probs, topP));
  if (minP > 0) {
    const least = Math.fround(Math.fround(minP) * maximum(probs));
    keep(indices(probs.length).filter((i) => probs[i]! >= least));
  }
  return { ids, probs };
}

function indices(count: number): Int32Array {
  const found = new Int32Array(count);
  for (let i = 0; i < count; i++) found[i] = i;
  return found;
}

/** Indices, ascending, of the fewest likeliest whose sum reaches topP; of equals the first. */
function nucleus(probs: Float32Array, topP: number): Int32Array {
  const whole = topP * sum(probs);
  // All that is smaller than this together does not make up the rest, so need not be sorted.
  const floor = ((1 - topP) * whole) / (2 * probs.length);
  let { count, least } = reach(probs.filter((p) => p >= floor), whole, false);
  if (!count) ({ count, least } = reach(probs.slice(), whole, true));
  let equal = count;
  for (const p of probs) if (p > least) equal--;
  return indices(probs.length).filter(
    (i) => probs[i]! > least || (probs[i] === least && equal-- > 0),
  );
}

/** How many of the largest reach `whole`, and the last of them; 0 where only all may. */
function reach(
  values: Float32Array, whole: number, all: boolean,
): { count: number; least: number } {
  values.sort();
  let total = 0;
  for (let i = values.length - 1; i >= 0; i--) {
    total += values[i]!;
    if (total >= whole) return { count: values.length - i, least: values[i]! };
  }
  return all ? { count: values.length, least: values[0]! } : { count: 0, least: 0 };
}

/** The index at which the running sum of float32[c] exceeds `uniform` (0 to 1) of the whole. */
export function pick(probs: Float32Array, uniform: number): number {
  const ends: number[] = [];
  for (let start = 0; start < probs.length; start += BLOCK) {
    const end = Math.min(start + BLOCK, probs.length);
    ends.push((ends.at(-1) ?? 0) + (probs[start]! + pairwiseSum(probs, start + 1, end)));
  }
  const last = ends.at(-1)!;
  const goal = uniform * last;
  // Rounding may make the goal the whole: then the last block that is not zero.
  const block = Math.min(searchSorted(ends, goal, "right"), searchSorted(ends, last, "left"));
  const part = probs.subarray(block * BLOCK, (block + 1) * BLOCK);
  const left = goal - (block ? ends[block - 1]! : 0);
  let total = 0;
  let likely = 0;
  for (let i = 0; i < part.length; i++) {
    total += part[i]!;
    if (total > left) return block * BLOCK + i;
    if (part[i]) likely = i;
  }
  // Rounding may lead past the block's end, to where nothing is likely.
  return block * BLOCK + likely;
}
