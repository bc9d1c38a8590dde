/** A loaded model: what `load` returns. */

import type * as api from "./qcc";
import { embed } from "./embedding";
import { QccError } from "./errors";
import { Generation, type Limits, Sequence, checkPrompt } from "./generation";
import type { Library } from "./library";
import type { Gpu } from "./device";
import { samplingParams } from "./sampling";
import { ChatTemplate, findTemplate } from "./template";
import type { Json, Tokenizer } from "./tokenizer";

// Sampling options that a model's configurations may set.
const DEFAULTED = [
  "temperature", "top_p", "top_k", "min_p",
  "repetition_penalty", "presence_penalty", "frequency_penalty",
] as const;

/** All that a model is made of. */
export interface Parts {
  id: string;
  chat: Json; // mlc-chat-config.json
  generation: Json; // generation_config.json
  config: Json; // tokenizer_config.json
  templateFile: string | undefined;
  tokenizer: Tokenizer;
  library: Library;
  gpu: Gpu;
  contextWindowSize: number | undefined;
  weightBytes: number;
}

export class LoadedModel implements api.Model {
  readonly id: string;
  readonly task: "chat" | "embedding";
  readonly contextWindowSize: number | undefined;
  readonly canChat: boolean;
  readonly defaults: api.SamplingOptions;
  readonly gpu: string;
  private readonly sequence: Sequence;
  private busy = false;

  constructor(private readonly parts: Parts) {
    const { library } = parts;
    this.id = parts.id;
    this.task = library.metadata.model_task === "embedding" ? "embedding" : "chat";
    this.contextWindowSize = parts.contextWindowSize;
    this.gpu = parts.gpu.name;
    this.defaults = samplingDefaults(parts.chat, parts.generation);
    this.canChat = this.task === "chat" && this.templateSource(false) !== undefined;
    this.sequence = new Sequence({
      limits: limitsOf(parts),
      append: (tokens, wanted) => library.append(tokens, wanted),
      pop: (count) => library.pop(count),
      clear: () => library.clear(),
    });
  }

  get memory(): { weights: number; peak: number } {
    return { weights: this.parts.weightBytes, peak: this.parts.library.peakBytes };
  }

  generate(prompt: string | number[], options: api.AnswerOptions = {}): api.Answer {
    this.mustWrite();
    const { signal, ...sampling } = options;
    const params = samplingParams(sampling, this.defaults);
    const { tokenizer } = this.parts;
    // A special token has no text in which a stop text could be found.
    const special = params.stop.map((text) => tokenizer.specialIds.get(text));
    const stops = [...special, ...params.stop_token_ids];
    if (!params.ignore_eos) stops.push(...tokenizer.eosIds);
    const generation = new Generation(this.sequence, {
      prompt: typeof prompt === "string" ? tokenizer.encode(prompt) : [...prompt],
      params,
      stopIds: new Set(stops.filter((id) => id !== undefined)),
      decode: (ids) => tokenizer.decode(ids),
      signal,
    });
    return new ModelAnswer(generation, (work) => this.alone(work));
  }

  chat(messages: api.Message[], options: api.ChatOptions = {}): api.Answer {
    const { tools, variables, add_generation_prompt, ...others } = options;
    const template: api.TemplateOptions = {
      ...(tools && { tools }),
      ...(variables && { variables }),
      ...(add_generation_prompt !== undefined && { add_generation_prompt }),
    };
    const prompt = this.parts.tokenizer.encodeRendered(this.render(messages, template));
    return this.generate(prompt, others);
  }

  async embed(
    texts: string | string[], options: api.EmbedOptions = {},
  ): Promise<Float32Array[]> {
    if (this.task !== "embedding") {
      throw new QccError("this model writes text; embed needs an embedding model");
    }
    const { library, tokenizer, chat } = this.parts;
    const { metadata } = library;
    const encoder = {
      limits: {
        window: metadata.context_window_size,
        chunk: metadata.prefill_chunk_size,
        batch: metadata.max_batch_size,
        dimensions: metadata.qcc.hidden_size!,
      },
      encode: (tokens: Int32Array, ends: Int32Array) => library.encode(tokens, ends),
    };
    const many = typeof texts === "string" ? [texts] : texts;
    const vectors: Float32Array[] = [];
    for await (const found of this.alone(async function* () {
      yield await embed(encoder, tokenizer, chat, many, options);
    })) {
      vectors.push(...found);
    }
    return vectors;
  }

  async logits(
    tokens: number[], options: { signal?: AbortSignal } = {},
  ): Promise<Float32Array[]> {
    this.mustWrite();
    checkPrompt(tokens, this.sequence.engine.limits);
    const { sequence } = this;
    const rows: Float32Array[] = [];
    const each = async function* (): AsyncGenerator<Float32Array> {
      sequence.clear();
      for (const token of tokens) {
        options.signal?.throwIfAborted();
        yield (await sequence.append([token], true))!;
      }
    };
    for await (const row of this.alone(each)) rows.push(row);
    return rows;
  }

  encode(text: string): number[] {
    return this.parts.tokenizer.encode(text);
  }

  decode(tokens: number[]): string {
    return this.parts.tokenizer.decode(tokens);
  }

  render(messages: api.Message[], options: api.TemplateOptions = {}): string {
    const source = this.templateSource(Boolean(options.tools));
    if (source === undefined) {
      throw new QccError("the model has no chat template (a base model?); use generate");
    }
    const texts = this.parts.tokenizer.specialTexts();
    return new ChatTemplate(source, texts).render(messages, options);
  }

  reset(): void {
    if (this.busy) throw new QccError("an answer is under way; stop it first");
    this.sequence.clear();
  }

  close(): void {
    this.parts.library.dispose();
  }

  private templateSource(tools: boolean): string | undefined {
    return findTemplate(this.parts.templateFile, this.parts.config, tools);
  }

  private mustWrite(): void {
    if (this.task === "chat") return;
    throw new QccError("an embedding model writes no text; use embed");
  }

  /** One piece of work at a time: there is one sequence. */
  private async *alone<T>(work: () => AsyncGenerator<T>): AsyncGenerator<T> {
    if (this.busy) throw new QccError("an answer is under way; await it, or stop it first");
    this.busy = true;
    try {
      yield* work();
    } finally {
      this.busy = false;
    }
  }
}

type Alone = (work: () => AsyncGenerator<string>) => AsyncGenerator<string>;

class ModelAnswer implements api.Answer {
  private read = false;

  constructor(private readonly generation: Generation, private readonly alone: Alone) {}

  get result(): api.Result {
    return this.generation.result;
  }

  [Symbol.asyncIterator](): AsyncIterator<string> {
    if (this.read) throw new QccError("an answer is read once; its text is in result");
    this.read = true;
    return this.alone(() => this.generation.run());
  }

  async complete(): Promise<api.Result> {
    for await (const _ of this) continue;
    return this.result;
  }
}

function limitsOf({ library, contextWindowSize }: Parts): Limits {
  const { metadata } = library;
  const slides = metadata.sliding_window_size > 0;
  const length = slides ? metadata.sliding_window_size : contextWindowSize!;
  return {
    vocabulary: metadata.qcc.vocab_size,
    chunk: Math.min(metadata.prefill_chunk_size, length),
    maxLength: contextWindowSize,
    window: slides ? length : undefined,
  };
}

/** mlc-chat-config.json comes first, generation_config.json gives what that lacks. */
export function samplingDefaults(chat: Json, generation: Json): api.SamplingOptions {
  const found: Record<string, unknown> = {};
  for (const name of DEFAULTED) {
    const value = name in chat ? chat[name] : generation[name];
    if (value !== undefined && value !== null) found[name] = value;
  }
  if (generation.do_sample === false && !("temperature" in chat)) found.temperature = 0;
  return found;
}
