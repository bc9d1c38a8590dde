/** One answer: its prompt is computed in chunks, then token by token until something ends it. */

import type { Result } from "./qcc";
import { Detokenizer } from "./detokenize";
import { QccError } from "./errors";
import { Sampler, type SamplingParams } from "./sampling";
import { StopStrings } from "./stop";

/** What computes: a library, or a stand-in of the tests. It holds one sequence. */
export interface Engine {
  readonly limits: Limits;
  /** Append at most a chunk of tokens -> logits float32[V] after the last, if they are wanted. */
  append(tokens: Int32Array, wanted: boolean): Promise<Float32Array | undefined>;
  /** Forget the last tokens, where the sequence never slid. */
  pop(count: number): void;
  /** Begin the sequence anew. */
  clear(): void;
}

/** In tokens; `maxLength` bounds prompt and answer, undefined: a sliding window of `window`. */
export interface Limits {
  vocabulary: number;
  chunk: number;
  maxLength: number | undefined;
  window: number | undefined;
}

/** What a request needs besides the engine. */
export interface Request {
  prompt: number[];
  params: SamplingParams;
  stopIds: Set<number>;
  decode: (ids: number[]) => string;
  signal?: AbortSignal | undefined;
}

/** The engine's sequence, and which tokens it holds. */
export class Sequence {
  private cached: number[] = [];

  constructor(readonly engine: Engine) {}

  /** Cut the sequence to what it shares with a prompt, less the last; returns that length. */
  reuse(prompt: number[]): number {
    const { window } = this.engine.limits;
    let shared = 0;
    while (shared < prompt.length - 1 && this.cached[shared] === prompt[shared]) shared++;
    const surplus = this.cached.length - shared;
    const slid = window !== undefined && this.cached.length > window;
    if (shared === 0 || (surplus && slid)) {
      this.clear();
      return 0;
    }
    if (surplus) this.engine.pop(surplus);
    this.cached.length = shared;
    return shared;
  }

  async append(tokens: number[], wanted: boolean): Promise<Float32Array | undefined> {
    try {
      const logits = await this.engine.append(Int32Array.from(tokens), wanted);
      this.cached.push(...tokens);
      return logits;
    } catch (error) {
      this.cached = []; // the sequence is in no known state
      throw error;
    }
  }

  clear(): void {
    if (this.cached.length) this.engine.clear();
    this.cached = [];
  }
}

/** Refuse a prompt that cannot run. */
export function checkPrompt(prompt: number[], limits: Limits): void {
  if (!prompt.length) throw new QccError("the prompt has no tokens");
  if (limits.maxLength !== undefined && prompt.length > limits.maxLength) {
    throw new QccError(
      `the prompt has ${prompt.length} tokens, the context window ${limits.maxLength}; shorten ` +
        "it, or begin a new conversation",
    );
  }
  const bad = prompt.find((id) => !(Number.isInteger(id) && id >= 0 && id < limits.vocabulary));
  if (bad !== undefined) {
    throw new QccError(
      `token id ${bad} in the prompt: the model has 0 to ${limits.vocabulary - 1}`,
    );
  }
}

/** Tokens that an answer may have; a full context leaves one. */
function room(prompt: number, wanted: number | undefined, limits: Limits): number {
  if (limits.maxLength === undefined) {
    if (wanted !== undefined) return wanted;
    throw new QccError(
      "with a sliding window an answer has no bound of its own; give max_tokens",
    );
  }
  return Math.min(Math.max(1, limits.maxLength - prompt), wanted ?? Infinity);
}

/** Runs one request; `text` comes in pieces, the rest when it is over. */
export class Generation {
  private text = "";
  private readonly tokens: number[] = [];
  private finishReason: Result["finishReason"] | undefined;
  private reused = 0;
  private started = 0;
  private first = 0;
  private last = 0;
  private readonly sampler: Sampler;
  private readonly detokenizer: Detokenizer;
  private readonly stops: StopStrings;
  private readonly most: number;

  constructor(private readonly sequence: Sequence, private readonly request: Request) {
    const { prompt, params, decode } = request;
    const { limits } = sequence.engine;
    checkPrompt(prompt, limits);
    this.most = room(prompt.length, params.max_tokens, limits);
    this.sampler = new Sampler(params, prompt, limits.vocabulary);
    this.detokenizer = new Detokenizer(decode, prompt);
    this.stops = new StopStrings(params.stop, params.include_stop);
  }

  /** Pieces of text, as soon as they are certain. */
  async *run(): AsyncGenerator<string> {
    try {
      this.started = performance.now();
      if (this.most === 0) yield* this.finish("length");
      let logits = this.finishReason ? undefined : await this.prefill();
      while (!this.finishReason && !this.request.signal?.aborted) {
        yield* this.accept(logits!);
        if (this.finishReason || this.request.signal?.aborted) break;
        logits = await this.sequence.append([this.tokens.at(-1)!], true);
      }
      if (!this.finishReason) yield* this.finish("cancelled");
    } finally {
      this.finishReason ??= "cancelled";
    }
  }

  /** Compute what the sequence lacks of the prompt. */
  private async prefill(): Promise<Float32Array | undefined> {
    const { prompt, signal } = this.request;
    const { chunk } = this.sequence.engine.limits;
    this.reused = this.sequence.reuse(prompt);
    let logits: Float32Array | undefined;
    for (let at = this.reused; at < prompt.length && !signal?.aborted; at += chunk) {
      const last = at + chunk >= prompt.length;
      logits = await this.sequence.append(prompt.slice(at, at + chunk), last);
    }
    return logits;
  }

  /** Choose the next token, add its text, and finish where the answer ends. */
  private *accept(logits: Float32Array): Generator<string> {
    const token = this.sampler.choose(logits);
    this.tokens.push(token);
    this.last = performance.now();
    this.first ||= this.last;
    const ends = this.request.stopIds.has(token);
    if (!ends || this.request.params.include_stop) {
      yield* this.emit(this.stops.push(this.detokenizer.push(token)));
    }
    if (ends || this.stops.matched !== undefined) yield* this.finish("stop");
    else if (this.tokens.length >= this.most) yield* this.finish("length");
  }

  /** Text that was held back comes out, unless a stop text ended the answer. */
  private *finish(reason: Result["finishReason"]): Generator<string> {
    yield* this.emit(this.stops.push(this.detokenizer.finish()));
    yield* this.emit(this.stops.finish());
    const stopped = this.stops.matched !== undefined && reason === "length";
    this.finishReason = stopped ? "stop" : reason;
  }

  private *emit(piece: string): Generator<string> {
    if (!piece) return;
    this.text += piece;
    yield piece;
  }

  get result(): Result {
    const prefill = Math.max(this.first - this.started, 0) / 1000;
    const decode = (this.last - this.first) / 1000;
    const computed = this.request.prompt.length - this.reused;
    const steps = this.tokens.length - 1;
    return {
      text: this.text,
      tokenIds: [...this.tokens],
      finishReason: this.finishReason ?? "cancelled",
      promptTokens: this.request.prompt.length,
      cachedTokens: this.reused,
      seconds: { prefill, decode },
      prefillTokensPerSecond: prefill > 0 ? computed / prefill : 0,
      decodeTokensPerSecond: steps > 0 && decode > 0 ? steps / decode : 0,
    };
  }
}
