// Answers the questions of the Python tests: node driver.mjs QUESTION ARGUMENT.json
import { readFileSync, writeSync } from "node:fs";
import { Detokenizer } from "../../../runtime/web/src/detokenize";
import { Generation, Sequence } from "../../../runtime/web/src/generation";
import { md5 } from "../../../runtime/web/src/md5";
import { exp, fma, sum } from "../../../runtime/web/src/numerics";
import { Generator } from "../../../runtime/web/src/random";
import { Sampler, candidates, pick, samplingParams } from "../../../runtime/web/src/sampling";
import { StopStrings } from "../../../runtime/web/src/stop";
import { ChatTemplate } from "../../../runtime/web/src/template";
import { Tokenizer } from "../../../runtime/web/src/tokenizer";
import { embed } from "../../../runtime/web/src/embedding";
import { checkTensors, parseMetadata, windowOf } from "../../../runtime/web/src/metadata";
import { parseShards, tensorBytes } from "../../../runtime/web/src/weights";

type Any = any;

const floats = (path: string): Float32Array => {
  const bytes = readFileSync(path);
  return new Float32Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length));
};
const bits = (values: Float32Array): string => md5(new Uint8Array(values.slice().buffer));
const message = (work: () => unknown): string => {
  try {
    work();
  } catch (error) {
    return (error as Error).message;
  }
  return "";
};

function tokenizerOf(folder: string, chat: Any = {}): Tokenizer {
  const read = (name: string): Any => {
    try {
      return JSON.parse(readFileSync(`${folder}/${name}`, "utf-8"));
    } catch {
      return {};
    }
  };
  return new Tokenizer({
    tokenizer: read("tokenizer.json"),
    config: read("tokenizer_config.json"),
    generation: read("generation_config.json"),
    chat,
  });
}

const questions: Record<string, (argument: Any) => unknown> = {
  random: (seeds: (number | string)[]) =>
    seeds.map((seed) => {
      const generator = new Generator(BigInt(seed));
      return Array.from({ length: 5 }, () => generator.random());
    }),

  fma: (triples: [number, number, number][]) => triples.map((triple) => fma(...triple)),

  exp: (path: string) => bits(floats(path).map(exp)),

  sums: (paths: string[]) => paths.map((path) => sum(floats(path))),

  candidates: (cases: Any[]) =>
    cases.map(({ path, temperature, top_k, top_p, min_p, uniforms }) => {
      const { ids, probs } = candidates(floats(path), temperature, top_k, top_p, min_p);
      const picks = uniforms.map((u: number) => ids[pick(probs, u)]);
      return { count: ids.length, ids: ids.reduce((a, b) => a + b, 0), probs: bits(probs), picks };
    }),

  choices: (cases: Any[]) =>
    cases.map(({ path, rows, prompt, params }) => {
      const logits = floats(path);
      const width = logits.length / rows;
      const sampler = new Sampler(samplingParams(params), prompt, width);
      return Array.from({ length: rows }, (_, row) =>
        sampler.choose(logits.slice(row * width, (row + 1) * width)),
      );
    }),

  refusals: (cases: Any[]) => cases.map((options) => message(() => samplingParams(options))),

  tokens: ({ folder, texts, chat }) => {
    const tokenizer = tokenizerOf(folder, chat);
    return {
      bos: tokenizer.bosId ?? null,
      eos: [...tokenizer.eosIds].sort((a, b) => a - b),
      encoded: texts.map((text: string) => tokenizer.encode(text || " ")),
      rendered: texts.map((text: string) => tokenizer.encodeRendered(text)),
      within: texts.map((text: string) => tokenizer.encodeWithin(text || " ", 9)),
    };
  },

  texts: ({ folder, ids }) => {
    const tokenizer = tokenizerOf(folder);
    return ids.map((tokens: number[]) => tokenizer.decode(tokens));
  },

  pieces: ({ folder, cases }) => {
    const tokenizer = tokenizerOf(folder);
    return cases.map(({ prompt, tokens }: Any) => {
      const detokenizer = new Detokenizer((ids) => tokenizer.decode(ids), prompt);
      return [...tokens.map((token: number) => detokenizer.push(token)), detokenizer.finish()];
    });
  },

  stops: (cases: Any[]) =>
    cases.map(({ stops, include, pieces }) => {
      const found = new StopStrings(stops, include);
      return [...pieces.map((piece: string) => found.push(piece)), found.finish()];
    }),

  templates: (cases: Any[]) =>
    cases.map(({ source, special, messages, options }) => {
      try {
        return { text: new ChatTemplate(source, special).render(messages, options) };
      } catch (error) {
        return { error: (error as Error).message };
      }
    }),

  md5: (sizes: number[]) =>
    sizes.map((size) => md5(Uint8Array.from({ length: size }, (_, i) => (i * 7 + 3) & 255))),

  upperHalves: (bytes: number[]) => {
    const record = {
      name: "w", shape: [bytes.length / 2], dtype: "float32", format: "f32-to-bf16" as const,
      nbytes: bytes.length, byteOffset: 1,
    };
    return [...tensorBytes(record, Uint8Array.from([99, ...bytes]))];
  },

  libraries: (cases: Any[]) =>
    cases.map(({ metadata, shards }) =>
      message(() => checkTensors(parseMetadata(JSON.stringify(metadata)), parseShards(shards, "T"))),
    ),

  windows: (cases: Any[]) =>
    cases.map(({ metadata, wanted, limit }) => {
      try {
        return windowOf(metadata, wanted ?? undefined, limit).cacheTokens;
      } catch (error) {
        return (error as Error).message;
      }
    }),

  // A stand-in whose vectors are what it was given: the texts' tokens, padded.
  embeddings: async ({ folder, chat, limits, texts, options }) => {
    const passes: number[][] = [];
    const encoder = {
      limits,
      encode: async (tokens: Int32Array, ends: Int32Array) => {
        passes.push([...ends]);
        const rows = new Float32Array(ends.length * limits.dimensions);
        ends.forEach((end, i) => {
          const start = i ? ends[i - 1]! : 0;
          rows.set(tokens.slice(start, end), i * limits.dimensions);
        });
        return rows;
      },
    };
    try {
      const vectors = await embed(encoder, tokenizerOf(folder), chat, texts, options);
      return { passes, vectors: vectors.map((vector) => [...vector]) };
    } catch (error) {
      return { error: (error as Error).message };
    }
  },

  // A model whose logits are known: those of Python's stand-in, from the tokens before.
  conversation: async ({ folder, limits, requests }) => {
    const tokenizer = tokenizerOf(folder);
    let held: number[] = [];
    let computed = 0;
    const engine = {
      limits: { maxLength: undefined, window: undefined, ...limits },
      append: async (tokens: Int32Array) => {
        held.push(...tokens);
        computed += tokens.length;
        return logitsAfter(held, limits.vocabulary);
      },
      pop: (count: number) => void held.splice(held.length - count),
      clear: () => void (held = []),
    };
    const sequence = new Sequence(engine);
    const answers = [];
    for (const { prompt, params, stop_ids, leave } of requests) {
      computed = 0;
      const generation = new Generation(sequence, {
        prompt,
        params: samplingParams(params),
        stopIds: new Set<number>(stop_ids),
        decode: (ids) => tokenizer.decode(ids),
      });
      const pieces: string[] = [];
      for await (const piece of generation.run()) {
        pieces.push(piece);
        if (pieces.length === leave) break;
      }
      const { text, tokenIds, finishReason, cachedTokens } = generation.result;
      answers.push({ pieces, text, tokenIds, finishReason, cachedTokens, computed });
    }
    return answers;
  },
};

/** float32[V] in whole numbers that both languages compute alike. */
function logitsAfter(held: number[], vocabulary: number): Float32Array {
  let state = 12345;
  for (const token of held) state = (Math.imul(state, 1103515245) + token + 12345) >>> 0;
  return Float32Array.from({ length: vocabulary }, (_, i) => {
    const mixed = Math.imul(state ^ Math.imul(i + 1, 2654435761), 2246822519) >>> 0;
    return (mixed >>> 20) / 256;
  });
}

const [, , question, path] = process.argv;
const answer = await questions[question!]!(JSON.parse(readFileSync(path!, "utf-8")));
writeSync(1, JSON.stringify(answer));
