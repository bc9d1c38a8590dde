/**
 * qcc.js: a compiled language model in a web page, on the visitor's GPU.
 *
 *     import { load } from "./qcc.js";
 *     const model = await load("./");
 *     for await (const piece of model.generate("Once upon a time")) console.log(piece);
 *
 * `qcc package web` writes it beside the model. Everything runs in the browser: nothing that a
 * visitor types leaves it. Errors are QccErrors, whose message is for users.
 */

/** How an answer is sampled; what is left out is as the model's own configuration says. */
export interface SamplingOptions {
  /** Most tokens of the answer; left out: as many as the context has room for. */
  max_tokens?: number;
  /** 0 is greedy: always the likeliest token. */
  temperature?: number;
  /** Choose among the k likeliest; 0 or -1: among all. */
  top_k?: number;
  /** Choose among the fewest likeliest tokens that together have this probability. */
  top_p?: number;
  /** Choose among the tokens that have at least this share of the likeliest's probability. */
  min_p?: number;
  /** Logits of tokens in prompt or answer are divided by it if positive, else multiplied. */
  repetition_penalty?: number;
  /** Subtracted from the logits of tokens that are in the answer. */
  presence_penalty?: number;
  /** Subtracted from the logits of tokens in the answer, for each time that they are there. */
  frequency_penalty?: number;
  /** Token id -> what is added to its logit. */
  logit_bias?: Record<number, number> | Map<number, number>;
  /** The same seed and settings choose the same tokens of the same logits, as in Python. */
  seed?: number | bigint;
  /** Texts that end the answer, of which they are no part. */
  stop?: string | string[];
  /** Token ids that end the answer. */
  stop_token_ids?: number[];
  /** What ended the answer is shown as well. */
  include_stop?: boolean;
  /** The model's own end tokens end nothing. */
  ignore_eos?: boolean;
}

/** A message of a conversation; a template may read further fields, as tool_calls. */
export interface Message {
  role: string;
  content: unknown;
  [field: string]: unknown;
}

/** What a chat template takes besides the messages. */
export interface TemplateOptions {
  /** JSON schemas of functions that the model may call. */
  tools?: unknown[];
  /** Further variables of the template, as enable_thinking. */
  variables?: Record<string, unknown>;
  /** Whether the assistant is to answer; left out: yes. */
  add_generation_prompt?: boolean;
}

/** Options of one answer. */
export interface AnswerOptions extends SamplingOptions {
  /** Aborting it ends the answer; its text so far stands. */
  signal?: AbortSignal;
}

export type ChatOptions = AnswerOptions & TemplateOptions;

/** An answer, or what there is of it. */
export interface Result {
  /** Without the end token and without what stopped it. */
  text: string;
  /** All tokens that were sampled, the end token too. */
  tokenIds: number[];
  /** stop: an end token or a stop text. length: max_tokens or the context. */
  finishReason: "stop" | "length" | "cancelled";
  promptTokens: number;
  /** Tokens of the prompt that were in the KV cache already. */
  cachedTokens: number;
  /** Until the first token, and from there to the last. */
  seconds: { prefill: number; decode: number };
  prefillTokensPerSecond: number;
  decodeTokensPerSecond: number;
}

/** The pieces of one answer's text, to be read once; leaving the loop early cancels it. */
export interface Answer extends AsyncIterable<string> {
  /** The answer so far. */
  readonly result: Result;
  /** Read all that is left. */
  complete(): Promise<Result>;
}

/** Options of embed. */
export interface EmbedOptions {
  /** Of the model's prompts, to go before each text; left out: its default. */
  promptName?: string;
  /** Cut a text of more tokens than the window; left out: yes. */
  truncate?: boolean;
  /** The first n numbers of each vector, made one of length 1 again. */
  dimensions?: number;
  signal?: AbortSignal;
}

/** A loaded model. One answer at a time. */
export interface Model {
  /** The name of the model and its format, as qwen2-q4f16_1. */
  readonly id: string;
  readonly task: "chat" | "embedding";
  /** Most tokens of prompt and answer together; undefined: a sliding window, no bound. */
  readonly contextWindowSize: number | undefined;
  /** Whether the model has a chat template. */
  readonly canChat: boolean;
  /** Sampling where an answer's options say nothing. */
  readonly defaults: SamplingOptions;
  /** The GPU, as the browser names it. */
  readonly gpu: string;
  /** Bytes of GPU memory: of the weights, and the most that were in use so far. */
  readonly memory: { weights: number; peak: number };

  /** Continue a text, or tokens. */
  generate(prompt: string | number[], options?: AnswerOptions): Answer;
  /** Answer the last message. What the KV cache holds of the conversation is not run again. */
  chat(messages: Message[], options?: ChatOptions): Answer;
  /** A vector of each text, of an embedding model. */
  embed(texts: string | string[], options?: EmbedOptions): Promise<Float32Array[]>;
  /** The logits after each of the tokens, float32[V] each; they begin a new context. */
  logits(tokens: number[], options?: { signal?: AbortSignal }): Promise<Float32Array[]>;
  /** The tokens of a text, as generate has them. */
  encode(text: string): number[];
  /** The text of tokens, special ones left out. */
  decode(tokens: number[]): string;
  /** The prompt that chat would give the model. */
  render(messages: Message[], options?: TemplateOptions): string;
  /** Forget what the KV cache holds. */
  reset(): void;
  /** Free the GPU's memory; the model answers no more. */
  close(): void;
}

/** How far a load is. */
export interface Progress {
  /** library: fetching code and tokenizer. shaders: the GPU's compiler still works. */
  stage: "library" | "weights" | "shaders" | "ready";
  /** Bytes of weights; 0 of 0 before they are known. */
  loaded: number;
  total: number;
  /** Whether all weights so far came from the browser's cache. */
  fromCache: boolean;
}

/** Options of load. */
export interface LoadOptions {
  onProgress?: (progress: Progress) => void;
  /** Aborting it ends the load. */
  signal?: AbortSignal;
  /** Most tokens of prompt and answer, up to what the model was compiled for. */
  contextWindowSize?: number;
  /** Keep the weights in the browser's cache; left out: yes. */
  cache?: boolean;
  /** Called once where the model can no longer run, as when the GPU is lost. */
  onFailure?: (error: QccError) => void;
}

/** What model-record.json holds, in the form that WebLLM reads as well. */
export interface ModelRecord {
  /** URL of the folder that has resolve/main/ in it. */
  model: string;
  model_id: string;
  /** URL of the wasm. */
  model_lib: string;
  required_features?: string[];
  vram_required_MB?: number;
  /** Names of the configuration's files, so that none is asked for in vain; bytes of weights. */
  qcc?: { files: string[]; weight_bytes: number };
}

/**
 * Load a model: `source` is the URL of a site that `qcc package web` wrote, of its
 * model-record.json, or such a record, whose URLs are relative to the page.
 */
export function load(source: string | URL | ModelRecord, options?: LoadOptions): Promise<Model>;

/** What went wrong, for users. */
export class QccError extends Error {}
