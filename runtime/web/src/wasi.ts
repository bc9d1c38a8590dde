/**
 * What the compiled library imports of WASI: a clock, standard output and error, and an exit.
 *
 * There are no files, no arguments and no environment. What the library writes to standard error
 * is kept: where it ends itself, that is the only word on why.
 */

const OK = 0;
const BAD_FILE = 8; // errno of the preview 1 interface
const KEPT = 4000; // characters of standard error

/** A provider in the form that TVM's runtime takes. */
export class Wasi {
  readonly imports: Record<string, WebAssembly.ModuleImports>;
  /** The end of what was written to standard error. */
  errors = "";
  private memory: WebAssembly.Memory | undefined;
  private readonly text = new TextDecoder();

  constructor(private readonly log: (text: string) => void = console.log) {
    this.imports = {
      wasi_snapshot_preview1: {
        clock_time_get: (clock: number, _precision: bigint, time: number) => {
          const now = clock === 0 ? Date.now() : performance.now();
          this.view().setBigUint64(time, BigInt(Math.round(now * 1e6)), true);
          return OK;
        },
        environ_sizes_get: (count: number, size: number) => {
          this.view().setUint32(count, 0, true);
          this.view().setUint32(size, 0, true);
          return OK;
        },
        environ_get: () => OK,
        fd_write: (file: number, parts: number, count: number, written: number) =>
          this.write(file, parts, count, written),
        fd_read: () => BAD_FILE,
        fd_close: () => BAD_FILE,
        fd_seek: () => BAD_FILE,
        proc_exit: (status: number) => {
          throw new Error(`the library ended itself with status ${status}`);
        },
      },
    };
  }

  /** Take the memory of an instance and run its constructors. */
  start(instance: WebAssembly.Instance): void {
    this.memory = instance.exports.memory as WebAssembly.Memory;
    (instance.exports._initialize as () => void)();
  }

  private view(): DataView {
    if (!this.memory) throw new Error("the library called WASI before it was started");
    return new DataView(this.memory.buffer);
  }

  private write(file: number, parts: number, count: number, written: number): number {
    if (file !== 1 && file !== 2) return BAD_FILE;
    const view = this.view();
    let total = 0;
    let text = "";
    for (let i = 0; i < count; i++) {
      const start = view.getUint32(parts + 8 * i, true);
      const size = view.getUint32(parts + 8 * i + 4, true);
      // A copy: what is written may lie in shared memory, which no decoder takes.
      text += this.text.decode(new Uint8Array(view.buffer, start, size).slice(), { stream: true });
      total += size;
    }
    if (file === 2) this.errors = (this.errors + text).slice(-KEPT);
    if (text.trim()) this.log(text.trimEnd());
    view.setUint32(written, total, true);
    return OK;
  }
}
