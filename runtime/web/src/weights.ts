/**
 * tensor-cache.json and its shards: fetched once, kept in the browser's cache, checked.
 *
 * A shard that comes over the network has its size and md5 checked before it is kept; one from the
 * cache its size. Shards are kept under their URL and md5, so other weights are never mistaken.
 */

import { QccError, messageOf } from "./errors";
import { fetchBytes } from "./fetching";
import { md5 } from "./md5";
import type { Json } from "./tokenizer";

const CACHE = "qcc-weights";
const AHEAD = 3; // shards on their way at once
const DTYPE_BYTES: Record<string, number> = { uint32: 4, float32: 4, float16: 2, bfloat16: 2 };

/** Where a stored tensor lies in its shard; `f32-to-bf16`: the upper halves of float32. */
export interface TensorRecord {
  name: string;
  shape: number[];
  dtype: string;
  format: "raw" | "f32-to-bf16";
  nbytes: number;
  byteOffset: number;
}

/** One file of weights. */
export interface Shard {
  dataPath: string;
  nbytes: number;
  md5sum: string;
  records: TensorRecord[];
}

/** The shards of a tensor-cache.json; `where` is its URL, for errors. */
export function parseShards(data: Json, where: string): Shard[] {
  const bad = (what: string): never => {
    throw new QccError(`${where}: ${what}; package the model again`);
  };
  const shards = Array.isArray(data.records) ? (data.records as Shard[]) : bad("has no records");
  for (const shard of shards) {
    if (typeof shard.dataPath !== "string" || !Number.isSafeInteger(shard.nbytes)) {
      bad("has a shard without dataPath or nbytes");
    }
    for (const record of shard.records) {
      const packed = record.format === "f32-to-bf16";
      const width = packed ? 2 : (DTYPE_BYTES[record.dtype] ?? bad(`has dtype ${record.dtype}`));
      const size = record.shape.reduce((a, b) => a * b, width);
      const end = record.byteOffset + record.nbytes;
      if (size !== record.nbytes || !(record.byteOffset >= 0 && end <= shard.nbytes)) {
        bad(`tensor ${record.name} does not fit ${shard.dataPath}`);
      }
    }
  }
  return shards;
}

/** A tensor's bytes in its dtype. */
export function tensorBytes(record: TensorRecord, shard: Uint8Array): Uint8Array {
  const bytes = shard.subarray(record.byteOffset, record.byteOffset + record.nbytes);
  if (record.format === "raw") return bytes;
  const wide = new Uint8Array(2 * bytes.length);
  for (let i = 0; i < bytes.length; i += 2) {
    wide[2 * i + 2] = bytes[i]!;
    wide[2 * i + 3] = bytes[i + 1]!;
  }
  return wide;
}

/** How shards are loaded. */
export interface WeightOptions {
  signal?: AbortSignal | undefined;
  /** Whether the browser's cache is used. */
  cache: boolean;
  /** Is told of bytes that came, and whether from the cache. */
  onBytes: (count: number, fromCache: boolean) => void;
}

/** All shards in order, some fetched ahead. */
export async function* loadShards(
  base: string, shards: Shard[], options: WeightOptions,
): AsyncGenerator<{ shard: Shard; bytes: Uint8Array }> {
  const cache = options.cache ? await openCache() : undefined;
  const broken = new AbortController();
  const signals = [broken.signal, ...(options.signal ? [options.signal] : [])];
  const one = (shard: Shard): Promise<Uint8Array> =>
    loadShard(new URL(shard.dataPath, base).href, shard, cache, {
      ...options,
      signal: AbortSignal.any(signals),
    });
  const coming: Promise<Uint8Array>[] = [];
  try {
    for (let i = 0; i < shards.length; i++) {
      while (coming.length < AHEAD && i + coming.length < shards.length) {
        const promise = one(shards[i + coming.length]!);
        promise.catch(() => undefined); // it is awaited below, or not wanted any more
        coming.push(promise);
      }
      yield { shard: shards[i]!, bytes: await coming.shift()! };
    }
    if (cache) await removeOthers(cache, base, shards);
  } finally {
    broken.abort();
  }
}

async function loadShard(
  url: string, shard: Shard, cache: Cache | undefined, options: WeightOptions,
): Promise<Uint8Array> {
  const key = keyOf(url, shard);
  const kept = await cache?.match(key);
  if (kept) {
    const bytes = new Uint8Array(await kept.arrayBuffer());
    if (bytes.length === shard.nbytes) {
      options.onBytes(bytes.length, true);
      return bytes;
    }
    await cache!.delete(key); // the browser lost a part of it
  }
  const onBytes = (count: number): void => options.onBytes(count, false);
  const bytes = await fetchBytes(url, { signal: options.signal, onBytes }, shard.nbytes);
  const found = md5(bytes);
  if (shard.md5sum && found !== shard.md5sum) {
    throw new QccError(
      `${url}: is damaged: its md5 is ${found}, recorded is ${shard.md5sum}; copy the file to ` +
        "the server again",
    );
  }
  try {
    await cache?.put(key, new Response(bytes));
  } catch (error) {
    // Of a full disk or a small quota: the model runs all the same, and loads again next time.
    console.warn(`qcc: ${url} is not kept in the browser's cache: ${messageOf(error)}`);
  }
  return bytes;
}

function keyOf(url: string, shard: Shard): string {
  return `${url}?md5=${shard.md5sum}`;
}

/** The browser's cache; undefined where it gives none, as over plain http or in private windows. */
async function openCache(): Promise<Cache | undefined> {
  if (typeof caches === "undefined") return undefined;
  try {
    return await caches.open(CACHE);
  } catch (error) {
    console.warn(`qcc: the browser offers no cache: ${messageOf(error)}`);
    return undefined;
  }
}

/** Remove what is kept of former weights of the same model. */
async function removeOthers(cache: Cache, base: string, shards: Shard[]): Promise<void> {
  const wanted = new Set(shards.map((s) => keyOf(new URL(s.dataPath, base).href, s)));
  for (const entry of await cache.keys()) {
    if (entry.url.startsWith(base) && !wanted.has(entry.url)) await cache.delete(entry);
  }
}
