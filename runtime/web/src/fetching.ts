/** Files over HTTP: whatever fails is an error that names the URL and says why. */

import { QccError, messageOf } from "./errors";
import type { Json } from "./tokenizer";

/** Options of a download. */
export interface FetchOptions {
  signal?: AbortSignal | undefined;
  /** Is told of the bytes of each part as it comes. */
  onBytes?: (count: number) => void;
}

async function request(url: string, options: FetchOptions): Promise<Response> {
  options.signal?.throwIfAborted();
  let response: Response;
  try {
    response = await fetch(url, options.signal ? { signal: options.signal } : {});
  } catch (error) {
    options.signal?.throwIfAborted();
    throw new QccError(
      `${url}: cannot be fetched (${messageOf(error)}); is the server up, and does it let this ` +
        "page read its files (CORS)?",
    );
  }
  if (!response.ok) {
    throw new QccError(`${url}: the server answers ${response.status} ${response.statusText}`);
  }
  return response;
}

/** The type that a server gives a file, for errors. */
function served(response: Response): string {
  return `served as ${response.headers.get("content-type") ?? "a file without a type"}`;
}

/** The bytes of a file; with `size` exactly as many. */
export async function fetchBytes(
  url: string, options: FetchOptions = {}, size?: number,
): Promise<Uint8Array<ArrayBuffer>> {
  const response = await request(url, options);
  try {
    return await read(response, url, options, size);
  } catch (error) {
    options.signal?.throwIfAborted();
    if (error instanceof QccError) throw error;
    throw new QccError(`${url}: the download broke off (${messageOf(error)}); load it again`);
  }
}

async function read(
  response: Response, url: string, options: FetchOptions, size: number | undefined,
): Promise<Uint8Array<ArrayBuffer>> {
  if (size === undefined) return new Uint8Array(await response.arrayBuffer());
  const bytes = new Uint8Array(size);
  let at = 0;
  const reader = response.body!.getReader();
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    if (at + part.value.length > size) {
      await reader.cancel();
      throw new QccError(`${url}: has more than the ${size} bytes that are recorded of it`);
    }
    bytes.set(part.value, at);
    at += part.value.length;
    options.onBytes?.(part.value.length);
  }
  if (at !== size) {
    throw new QccError(
      `${url}: is truncated: ${at} bytes came, ${size} are recorded (${served(response)}); ` +
        "copy the file to the server again",
    );
  }
  return bytes;
}

/** A library: bytes that begin as WebAssembly does, whatever type the server gives them. */
export async function fetchWasm(
  url: string, options: FetchOptions = {},
): Promise<Uint8Array<ArrayBuffer>> {
  const response = await request(url, options);
  const bytes = await read(response, url, options, undefined);
  if (String.fromCharCode(...bytes.subarray(0, 4)) !== "\0asm") {
    throw new QccError(
      `${url}: is no WebAssembly (${served(response)}, ${bytes.length} bytes); the server must ` +
        "send the file itself, best as application/wasm",
    );
  }
  return bytes;
}

/** The object in a JSON file. */
export async function fetchJson(url: string, options: FetchOptions = {}): Promise<Json> {
  const response = await request(url, options);
  let found: unknown;
  try {
    found = JSON.parse(await response.text());
  } catch (error) {
    options.signal?.throwIfAborted();
    throw new QccError(`${url}: is no JSON (${served(response)}): ${messageOf(error)}`);
  }
  if (!found || typeof found !== "object" || Array.isArray(found)) {
    throw new QccError(`${url}: holds no JSON object`);
  }
  return found as Json;
}

/** A text file. */
export async function fetchText(url: string, options: FetchOptions = {}): Promise<string> {
  return (await request(url, options)).text();
}
