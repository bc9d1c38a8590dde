/** Text <-> token ids, with the BOS and EOS tokens of a model, as qcc's Python runtime has them. */

import { ByteFallbackDecoder, Tokenizer as Backend } from "@huggingface/tokenizers";
import { QccError, messageOf } from "./errors";

export type Json = Record<string, unknown>;

const REPLACEMENT = "\ufffd";
const utf8 = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

/** The JSON files that a tokenizer is made of; all but the first may be empty. */
export interface TokenizerFiles {
  tokenizer: Json;
  config: Json;
  generation: Json;
  chat: Json; // mlc-chat-config.json
}

/** A tokenizer.json, and what the configurations beside it say. */
export class Tokenizer {
  readonly bosId: number | undefined;
  readonly eosIds: Set<number>;
  /** Special tokens: text -> id. */
  readonly specialIds = new Map<string, number>();
  private readonly backend: Backend;
  private readonly config: Json;

  constructor(files: TokenizerFiles) {
    this.config = files.config;
    try {
      // What else tokenizer_config.json says is for training and for Python's classes.
      this.backend = new Backend(files.tokenizer, {});
    } catch (error) {
      throw new QccError(`tokenizer.json cannot be read: ${messageOf(error)}`);
    }
    fallBackByBytes(this.backend.decoder);
    for (const [id, token] of this.backend.get_added_tokens_decoder()) {
      if (token.special) this.specialIds.set(token.content, id);
    }
    const bos = [
      this.tokenId(this.specialText("bos_token")),
      files.chat.bos_token_id,
      files.generation.bos_token_id,
    ];
    this.bosId = bos.map((value) => Math.min(...ids(value))).find((id) => id < Infinity);
    this.eosIds = new Set([...ids(files.chat.eos_token_id), ...ids(files.generation.eos_token_id)]);
    if (!this.eosIds.size) this.eosIds = new Set(ids(this.tokenId(this.specialText("eos_token"))));
  }

  /** The tokens of a prompt: with BOS where the model wants it; of "" the BOS alone. */
  encode(text: string): number[] {
    const found = this.begun(text);
    if (found.length) return found;
    if (this.bosId !== undefined) return [this.bosId];
    throw new QccError("the prompt is empty, and the model has no BOS token to begin with");
  }

  /** The tokens of a rendered chat template, which holds its special tokens as text. */
  encodeRendered(text: string): number[] {
    return this.run(text, false);
  }

  /** At most `limit` tokens of a text, the special ones at its end among them; of how many. */
  encodeWithin(text: string, limit: number): { ids: number[]; count: number } {
    let found = this.ended(this.begun(text));
    if (!found.length) found = this.encode(text);
    if (found.length <= limit) return { ids: found, count: found.length };
    // The text's own tokens stand between those that the post-processor and we add.
    const own = this.run(text, false);
    const added = found.length - own.length;
    if (added > limit) {
      throw new QccError(`a text has ${added} special tokens, at most ${limit} tokens fit`);
    }
    let lead = 0;
    while (lead < added && own.some((id, i) => found[lead + i] !== id)) lead++;
    const tail = found.slice(lead + own.length);
    const kept = own.slice(0, limit - added);
    return { ids: [...found.slice(0, lead), ...kept, ...tail], count: found.length };
  }

  /** The text of tokens, special ones left out. */
  decode(tokens: number[]): string {
    if (!tokens.length) return "";
    const options = { skip_special_tokens: true, clean_up_tokenization_spaces: false };
    return this.backend.decode(tokens, options);
  }

  /** The id of the token that is exactly `text`. */
  tokenId(text: string | undefined): number | undefined {
    return text === undefined ? undefined : this.backend.token_to_id(text);
  }

  /** All special tokens of tokenizer_config.json by their key: what a chat template may name. */
  specialTexts(): Record<string, string> {
    const keys = Object.keys(this.config).filter((key) => key.endsWith("_token"));
    const found = keys.map((key) => [key, this.specialText(key)]);
    return Object.fromEntries(found.filter(([, text]) => text !== undefined));
  }

  private specialText(key: string): string | undefined {
    let value = this.config[key];
    if (value && typeof value === "object") value = (value as Json).content;
    return typeof value === "string" ? value : undefined;
  }

  /** The tokens with BOS, where tokenizer_config.json wants it and tokenizer.json lacks it. */
  private begun(text: string): number[] {
    const found = this.run(text, true);
    const adds = this.config.add_bos_token === true && this.bosId !== undefined;
    return adds && found[0] !== this.bosId ? [this.bosId!, ...found] : found;
  }

  /** The tokens with EOS, where tokenizer_config.json wants it and tokenizer.json lacks it. */
  private ended(found: number[]): number[] {
    const eos = this.tokenId(this.specialText("eos_token"));
    const adds = this.config.add_eos_token === true && eos !== undefined;
    return adds && found.at(-1) !== eos ? [...found, eos!] : found;
  }

  private run(text: string, addSpecial: boolean): number[] {
    try {
      return this.backend.encode(text, { add_special_tokens: addSpecial }).ids;
    } catch (error) {
      throw new QccError(`the tokenizer cannot encode the prompt: ${messageOf(error)}`);
    }
  }
}

/** An id, a list of ids or nothing, as the configurations hold them. */
function ids(value: unknown): number[] {
  const values = Array.isArray(value) ? value : [value];
  return values.filter((id) => Number.isSafeInteger(id) && id >= 0);
}

/** Decode bytes as the tokenizers library of Python: invalid ones become U+FFFD, one for each. */
function fallBackByBytes(decoder: unknown): void {
  const nested = (decoder as { decoders?: unknown[] } | null)?.decoders;
  nested?.forEach(fallBackByBytes);
  if (!(decoder instanceof ByteFallbackDecoder)) return;
  decoder.decode_chain = (tokens: string[]): string[] => {
    const texts: string[] = [];
    let bytes: number[] = [];
    const flush = (): void => {
      if (bytes.length) texts.push(textOf(bytes));
      bytes = [];
    };
    for (const token of tokens) {
      const byte = /^<0x([0-9a-fA-F]{2})>$/.exec(token);
      if (byte) {
        bytes.push(parseInt(byte[1]!, 16));
      } else {
        flush();
        texts.push(token);
      }
    }
    flush();
    return texts;
  };
}

function textOf(bytes: number[]): string {
  try {
    return utf8.decode(new Uint8Array(bytes));
  } catch (error) {
    if (!(error instanceof TypeError)) throw error; // that it is no UTF-8 is a TypeError
    return REPLACEMENT.repeat(bytes.length);
  }
}
