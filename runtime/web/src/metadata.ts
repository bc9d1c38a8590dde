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
