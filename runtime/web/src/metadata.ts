/** What a compiled library says of itself: `_metadata()`, checked. */

import { QccError, messageOf } from "./errors";
import type { Shard } from "./weights";

const FORMAT = 1; // of what qcc adds
const PAGE_SIZE = 16; // tokens

/** A stored tensor, without its data. */
export interface ParamType {
  name: string;
  shape: number[];
  dtype: string;
}

/** The fields that are used. Sizes in tokens; -1 where the library has none. */
export interface Metadata {
  model_task: string;
  context_window_size: number;
  sliding_window_size: number;
  attention_sink_size: number;
  prefill_chunk_size: number;
  max_batch_size: number;
  params: ParamType[];
  qcc: {
    format: number;
    vocab_size: number;
    hidden_size?: number;
    page_size: number;
    compute_dtype: string;
    kv_storages: Record<string, { token_values: number }>;
    states?: unknown[];
    extents?: unknown[];
    slots: { name: string; from: string[]; repack: string | null; setting?: string | null }[];
  };
}

/** Parse the text of `_metadata()`. */
export function parseMetadata(text: string): Metadata {
  let data: Metadata;
  try {
    data = JSON.parse(text) as Metadata;
  } catch (error) {
    throw new QccError(`the library's _metadata is no JSON: ${messageOf(error)}`);
  }
  if (data.qcc?.format !== FORMAT || data.qcc.page_size !== PAGE_SIZE) {
    throw new QccError(
      `the library is of format ${data.qcc?.format}, this page runs format ${FORMAT}; compile ` +
        "and package the model again",
    );
  }
  if (data.qcc.states?.length) {
    throw new QccError("models whose layers keep states are not run in the browser yet");
  }
  const { slots, extents } = data.qcc;
  const packed = slots.some((slot) => slot.repack !== null || slot.setting != null);
  const stored = slots.map((slot) => slot.from[0]).join() === data.params.map((p) => p.name).join();
  if (packed || !stored || extents?.length) {
    throw new QccError("the library wants its weights in another layout than they are stored in");
  }
  return data;
}

/** Check that the shards hold the library's tensors; returns the largest. */
export function checkTensors(meta: Metadata, shards: Shard[]): void {
  const found = new Map(shards.flatMap((s) => s.records).map((record) => [record.name, record]));
  for (const { name, shape, dtype } of meta.params) {
    const record = found.get(name);
    if (!record || record.dtype !== dtype || record.shape.join() !== shape.join()) {
      const has = record ? `${record.dtype}[${record.shape}]` : "missing";
      throw new QccError(
        `tensor ${name} is ${has}, the library wants ${dtype}[${shape}]: weights and library are ` +
          "of different compiles; package the model again",
      );
    }
  }
}

/**
 * The context window (undefined: a sliding one), and how many tokens the KV cache is made for.
 * `wanted` undefined: as many as were compiled for and fit; `limit`: the bytes of one buffer, in
 * which a layer's keys and values lie.
 */
export function windowOf(
  metadata: Metadata, wanted: number | undefined, limit: number,
): { contextWindowSize: number | undefined; cacheTokens: number } {
  const { context_window_size: most, sliding_window_size: window, qcc } = metadata;
  const values = Object.values(qcc.kv_storages)[0]?.token_values ?? 0;
  const bytes = values * (qcc.compute_dtype === "float32" ? 4 : 2);
  // The cache adds a page, and with a sliding window two more.
  const pages = Math.floor(limit / (bytes * PAGE_SIZE)) - (window > 0 ? 3 : 1);
  const fitting = values ? pages * PAGE_SIZE : Infinity;
  if (window > 0 && wanted !== undefined) {
    throw new QccError(
      `contextWindowSize ${wanted}: this model has a sliding window of ${window} tokens and no ` +
        "bound on the context; leave the option out",
    );
  }
  const size = window > 0 ? window : (wanted ?? Math.min(most, Math.max(fitting, PAGE_SIZE)));
  if (window <= 0 && !(Number.isInteger(size) && size >= 1 && size <= most)) {
    throw new QccError(
      `contextWindowSize ${wanted}: the library was compiled for 1 to ${most} tokens`,
    );
  }
  if (size > fitting) {
    throw new QccError(
      `a KV cache of ${size} tokens is too large for this GPU, one buffer of which holds ` +
        `${Math.max(fitting, 0)} tokens of a layer; compile with a smaller --context-window`,
    );
  }
  return { contextWindowSize: window > 0 ? undefined : size, cacheTokens: size };
}
