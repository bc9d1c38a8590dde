/** A compiled library on a GPU: its functions, its weights, its KV cache. No text, no policy. */

import { instantiate } from "tvmjs";
import type {
  DLDevice, Instance, Module, PackedFunc, Tensor, TVMArray, TVMObject, VirtualMachine,
} from "tvmjs";
import { QccError, messageOf } from "./errors";
import type { Gpu } from "./device";
import { type Metadata, parseMetadata } from "./metadata";
import { type TensorRecord, tensorBytes } from "./weights";
import { Wasi } from "./wasi";

const SEQUENCE = 0; // there is one
const SHADERS = "webgpu.get_fmap";
// Trees of drafts, copies of pages, and what we do with logits in JavaScript.
const RARE = /tree_prefill|copy|debug|argsort|sample|softmax|apply_/;

/** The virtual machine of one library. */
export class Library {
  readonly metadata: Metadata;
  private readonly device: DLDevice;
  private readonly vm: VirtualMachine;
  private readonly functions = new Map<string, PackedFunc>();
  private readonly tensors = new Map<string, Tensor>();
  private readonly outputs = new Map<number, Tensor>(); // by their size: where results are read
  private params: TVMArray | undefined;
  private cache: TVMObject | undefined;

  private constructor(
    private readonly tvm: Instance, private readonly gpu: Gpu, private readonly wasi: Wasi,
  ) {
    this.device = tvm.webgpu();
    this.vm = this.scope(() => tvm.detachFromCurrentScope(tvm.createVirtualMachine(this.device)));
    this.metadata = this.scope(() => parseMetadata(this.call("_metadata") as string));
  }

  /** Instantiate a wasm on a GPU. */
  static async open(wasm: ArrayBuffer, gpu: Gpu): Promise<Library> {
    const log = (text: string): void => console.info(`qcc: ${text}`);
    const wasi = new Wasi(log);
    try {
      const tvm = await instantiate(wasm, wasi, log);
      tvm.initWebGPU(gpu.device);
      return new Library(tvm, gpu, wasi);
    } catch (error) {
      if (error instanceof QccError) throw error;
      throw new QccError(`the library does not start: ${reasonOf(error, wasi)}`);
    }
  }

  /** Compile the shaders that answers need; an error of one ends the device. */
  async compileShaders(): Promise<void> {
    const module = this.vm.getInternalModule();
    const needed = {
      getFunction: (name: string) =>
        name === SHADERS ? () => this.usualShaders(module) : module.getFunction(name),
    };
    const what = "a shader does not compile on this GPU";
    try {
      await this.gpu.guard(() => this.tvm.asyncLoadWebGPUPipelines(needed), what);
    } catch (error) {
      throw error instanceof QccError ? error : this.gpu.fail(`${what}: ${messageOf(error)}`);
    }
  }

  /** The JSON of all shaders but those that only other clients run; they compile on first use. */
  private usualShaders(module: Module): string {
    const all = JSON.parse(module.getFunction(SHADERS)() as string) as Record<string, unknown>;
    const usual = Object.entries(all).filter(([name]) => !RARE.test(name));
    return JSON.stringify(Object.fromEntries(usual));
  }

  /** Copy one tensor to the GPU. */
  async loadTensor(record: TensorRecord, shard: Uint8Array): Promise<void> {
    const bytes = tensorBytes(record, shard);
    await this.gpu.guard(async () => {
      this.scope(() => {
        const { shape, dtype } = record;
        const tensor = this.tvm.empty(shape, dtype, this.device);
        if (bytes.length % 4 === 0) {
          tensor.copyFromRawBytes(bytes);
        } else {
          // WebGPU writes whole words; TVM pads what comes from the wasm's memory.
          const host = this.tvm.empty(shape, dtype, this.tvm.cpu()).copyFromRawBytes(bytes);
          tensor.copyFrom(host);
        }
        this.tensors.set(record.name, this.tvm.detachFromCurrentScope(tensor));
      });
      await this.device.sync();
    });
  }

  /** All tensors are loaded: make the parameters of them. */
  bind(): void {
    this.scope(() => {
      const tensors = this.metadata.params.map(({ name }) => this.tensors.get(name)!);
      this.params = this.tvm.detachFromCurrentScope(this.tvm.makeTVMArray(tensors));
    });
  }

  /** Reserve a KV cache of so many tokens, with one sequence. */
  async makeCache(tokens: number): Promise<void> {
    await this.gpu.guard(async () => {
      this.scope(() => {
        const { prefill_chunk_size, qcc, sliding_window_size } = this.metadata;
        const slides = sliding_window_size > 0 ? 1 : 0;
        const sizes = [1, tokens, prefill_chunk_size, qcc.page_size, slides];
        const shapes = sizes.map((size) => this.tvm.makeShapeTuple([size]));
        const cache = this.call("create_tir_paged_kv_cache", ...shapes) as TVMObject;
        this.cache = this.tvm.detachFromCurrentScope(cache);
        this.addSequence();
      });
      await this.device.sync();
    });
  }

  /** Append tokens to the sequence -> logits float32[V] after the last, if they are wanted. */
  async append(tokens: Int32Array, wanted: boolean): Promise<Float32Array | undefined> {
    const name = tokens.length === 1 ? "decode" : "prefill";
    const results = await this.run(() => {
      const hidden = this.call("embed", this.upload(tokens), this.params) as Tensor;
      const input = hidden.view([1, tokens.length, hidden.shape.at(-1)!]);
      const shapes = [[SEQUENCE], [tokens.length]].map((ids) => this.tvm.makeShapeTuple(ids));
      this.state("kv_state_begin_forward", ...shapes);
      const result = this.call(name, input, this.cache, this.params) as TVMArray;
      this.state("kv_state_end_forward");
      return wanted ? [result.get(0) as Tensor] : [];
    });
    return results[0];
  }

  /** Texts one behind the other, each up to ends[i] -> vectors float32[b * H]. */
  async encode(tokens: Int32Array, ends: Int32Array): Promise<Float32Array> {
    const results = await this.run(() => [
      this.call("encode", this.upload(tokens), this.upload(ends), this.params) as Tensor,
    ]);
    return results[0]!;
  }

  /** Forget the last tokens of the sequence, which must not have slid. */
  pop(count: number): void {
    this.guarded(() => this.state("kv_state_popn", ...this.integers(SEQUENCE, count)));
  }

  /** Begin the sequence anew. */
  clear(): void {
    this.guarded(() => {
      this.state("kv_state_clear");
      this.addSequence();
    });
  }

  /** Bytes of GPU memory, the most that were in use; TVM tells whole MiB. */
  get peakBytes(): number {
    const found = /peak-memory=(\d+)/.exec(this.tvm.runtimeStatsText());
    return Number(found?.[1] ?? 0) * 2 ** 20;
  }

  /** Free the GPU's memory. A device that was lost has taken TVM with it. */
  dispose(): void {
    const lost = this.gpu.failure;
    this.gpu.close();
    if (!lost) this.tvm.dispose();
  }

  private addSequence(): void {
    const { sliding_window_size: window, attention_sink_size: sink } = this.metadata;
    this.state("kv_state_add_sequence", ...this.integers(SEQUENCE));
    if (window > 0) {
      const name = "attention_kv_cache_enable_sliding_window_for_seq";
      this.state(name, ...this.integers(SEQUENCE, window, Math.max(sink, 0)));
    }
  }

  /** Run on the GPU and read the tensors that `work` returns, float32. */
  private run(work: () => Tensor[]): Promise<Float32Array[]> {
    return this.gpu.guard(async () => {
      const copies = this.guarded(() => work().map((tensor) => this.readInto(tensor)));
      await this.device.sync();
      return copies.map((copy) => new Float32Array(copy.toRawBytes().buffer));
    });
  }

  /** A tensor in the wasm's memory, into which the GPU is told to copy. */
  private readInto(tensor: Tensor): Tensor {
    if (tensor.dtype !== "float32") throw new QccError(`a result is ${tensor.dtype}, not float32`);
    const size = tensor.shape.reduce((a, b) => a * b, 1);
    let copy = this.outputs.get(size);
    if (!copy) {
      const made = this.tvm.empty([size], "float32", this.tvm.cpu());
      copy = this.tvm.detachFromCurrentScope(made);
      this.outputs.set(size, copy);
    }
    return copy.copyFrom(tensor.view([size]));
  }

  private upload(values: Int32Array): Tensor {
    return this.tvm.empty([values.length], "int32", this.device).copyFrom(values);
  }

  private integers(...values: number[]): unknown[] {
    return values.map((value) => this.tvm.scalar(value, "int64"));
  }

  private state(name: string, ...args: unknown[]): void {
    this.global(`vm.builtin.${name}`)(this.cache, ...args);
  }

  private call(name: string, ...args: unknown[]): unknown {
    return this.once(name, () => this.vm.getFunction(name))(...args);
  }

  private global(name: string): PackedFunc {
    return this.once(name, () => this.tvm.getGlobalFunc(name));
  }

  private once(name: string, find: () => PackedFunc): PackedFunc {
    let found = this.functions.get(name);
    if (!found) {
      found = this.tvm.detachFromCurrentScope(find());
      this.functions.set(name, found);
    }
    return found;
  }

  /** Call into the wasm; an error there ends it, and says why on standard error at most. */
  private guarded<T>(work: () => T): T {
    this.gpu.check();
    try {
      return this.scope(work);
    } catch (error) {
      if (error instanceof QccError) throw error;
      throw this.gpu.fail(`the library failed: ${reasonOf(error, this.wasi)}`);
    }
  }

  /** Whatever TVM makes within is freed at the end. */
  private scope<T>(work: () => T): T {
    this.tvm.beginScope();
    try {
      return work();
    } finally {
      this.tvm.endScope();
    }
  }
}

function reasonOf(error: unknown, wasi: Wasi): string {
  const said = wasi.errors.trim();
  return said ? messageOf(said) : messageOf(error);
}
