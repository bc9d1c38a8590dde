/** load: from URLs to a model that runs. The public types are in qcc.d.ts. */

import type * as api from "./qcc";
import { Gpu } from "./device";
import { QccError } from "./errors";
import { fetchJson, fetchText, fetchWasm } from "./fetching";
import { Library } from "./library";
import { checkTensors, windowOf } from "./metadata";
import { LoadedModel } from "./model";
import { type Json, Tokenizer } from "./tokenizer";
import { type Shard, loadShards, parseShards } from "./weights";

export { QccError };

const RECORD = "model-record.json";
const OPTIONAL = ["tokenizer_config.json", "generation_config.json", "chat_template.jinja"];

export async function load(
  source: string | URL | api.ModelRecord, options: api.LoadOptions = {},
): Promise<api.Model> {
  const { signal, onProgress } = options;
  const state: api.Progress = { stage: "library", loaded: 0, total: 0, fromCache: true };
  const report = (changes: Partial<api.Progress>): void => {
    Object.assign(state, changes);
    onProgress?.({ ...state });
  };
  report({});
  const { record, base } = await findRecord(source, signal);
  const folder = modelFolder(record, base);
  const tensorCache = new URL("tensor-cache.json", folder).href;
  const shards = parseShards(await fetchJson(tensorCache, { signal }), tensorCache);

  const fail = (error: QccError): void => options.onFailure?.(error);
  const features = record.required_features ?? [];
  const gpu = await Gpu.open({ features, largest: largestOf(shards) }, fail);
  let library: Library | undefined;
  try {
    const wasm = await fetchWasm(new URL(record.model_lib, base).href, { signal });
    const texts = await fetchTexts(record, folder, signal);
    const tokenizer = new Tokenizer(texts);
    library = await Library.open(wasm.buffer, gpu);
    checkTensors(library.metadata, shards);
    const limit = gpu.device.limits.maxStorageBufferBindingSize;
    const sizes = windowOf(library.metadata, options.contextWindowSize, limit);

    // The GPU's compiler works while the weights come, and both end the load where they fail.
    const compiling = library.compileShaders();
    const weightBytes = shards.reduce((sum, shard) => sum + shard.nbytes, 0);
    report({ stage: "weights", total: weightBytes });
    const onBytes = (count: number, fromCache: boolean): void =>
      report({ loaded: state.loaded + count, fromCache: state.fromCache && fromCache });
    const fetching = async (library: Library): Promise<void> => {
      const coming = loadShards(folder, shards, { signal, cache: options.cache ?? true, onBytes });
      for await (const { shard, bytes } of coming) {
        for (const tensor of shard.records) await library.loadTensor(tensor, bytes);
      }
      report({ stage: "shaders" });
    };
    await Promise.race([Promise.all([compiling, fetching(library)]), whenAborted(signal)]);
    library.bind();
    if (library.metadata.model_task !== "embedding") await library.makeCache(sizes.cacheTokens);
    signal?.throwIfAborted();
    report({ stage: "ready" });
    return new LoadedModel({
      ...texts,
      id: record.model_id,
      tokenizer,
      library,
      gpu,
      contextWindowSize: sizes.contextWindowSize,
      weightBytes,
    });
  } catch (error) {
    if (library) library.dispose();
    else gpu.close();
    throw error;
  }
}

/** Rejects when the load is aborted; else never settles. */
function whenAborted(signal: AbortSignal | undefined): Promise<never> {
  return new Promise((_, reject) => {
    signal?.addEventListener("abort", () => reject(signal.reason), { once: true });
  });
}

/** The record, and the URL that its own URLs are relative to. */
async function findRecord(
  source: string | URL | api.ModelRecord, signal: AbortSignal | undefined,
): Promise<{ record: api.ModelRecord; base: string }> {
  const page = globalThis.document?.baseURI ?? globalThis.location?.href;
  if (typeof source === "object" && !(source instanceof URL)) {
    return { record: source, base: page };
  }
  const given = new URL(source, page);
  const isRecord = given.pathname.endsWith(".json");
  if (!isRecord && !given.pathname.endsWith("/")) given.pathname += "/";
  const base = isRecord ? given.href : new URL(RECORD, given).href;
  const record = (await fetchJson(base, { signal })) as unknown as api.ModelRecord;
  for (const key of ["model", "model_id", "model_lib"] as const) {
    if (typeof record[key] !== "string") throw new QccError(`${base}: has no ${key}`);
  }
  return { record, base };
}

/** The folder of the model's files; resolve/main/ is added as WebLLM does. */
function modelFolder(record: api.ModelRecord, base: string): string {
  const url = new URL(record.model, base).href;
  const folder = url.endsWith("/") ? url : `${url}/`;
  return folder.includes("/resolve/") ? folder : `${folder}resolve/main/`;
}

interface Texts {
  tokenizer: Json;
  config: Json;
  generation: Json;
  chat: Json;
  templateFile: string | undefined;
}

/** The configurations; files that the record does not list are taken not to be there. */
async function fetchTexts(
  record: api.ModelRecord, folder: string, signal: AbortSignal | undefined,
): Promise<Texts & { tokenizer: Json }> {
  const url = (name: string): string => new URL(name, folder).href;
  const listed = record.qcc?.files ?? OPTIONAL;
  const json = (name: string): Promise<Json> => fetchJson(url(name), { signal });
  const optional = (name: string): Promise<Json> =>
    listed.includes(name) ? json(name) : Promise.resolve({});
  const template = "chat_template.jinja";
  const [tokenizer, config, generation, chat, templateFile] = await Promise.all([
    json("tokenizer.json"),
    optional("tokenizer_config.json"),
    optional("generation_config.json"),
    json("mlc-chat-config.json"),
    listed.includes(template) ? fetchText(url(template), { signal }) : undefined,
  ]);
  return { tokenizer, config, generation, chat, templateFile };
}

function largestOf(shards: Shard[]): { name: string; nbytes: number } {
  let largest = { name: "", nbytes: 0 };
  for (const { name, nbytes, format } of shards.flatMap((shard) => shard.records)) {
    const size = format === "raw" ? nbytes : 2 * nbytes;
    if (size > largest.nbytes) largest = { name, nbytes: size };
  }
  return largest;
}

({ load, QccError }) satisfies typeof api;
