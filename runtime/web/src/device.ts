/** The GPU: one that the model fits, and every error that the browser tells of it. */

import { QccError, messageOf } from "./errors";

/** What a model asks of a GPU. */
export interface Needs {
  features: string[];
  /** The largest tensor that a kernel reads: its name and bytes. */
  largest: { name: string; nbytes: number };
}

const MB = 1e6;
const ADVICE: Record<string, string> = {
  "shader-f16": "a model compiled with --quant q4f32_1 does without it",
};
// Asked for as the adapter offers them: the defaults are small.
const LIMITS = [
  "maxBufferSize",
  "maxStorageBufferBindingSize",
  "maxStorageBuffersPerShaderStage",
  "maxComputeWorkgroupStorageSize",
  "maxComputeInvocationsPerWorkgroup",
  "maxComputeWorkgroupSizeX",
  "maxComputeWorkgroupSizeY",
  "maxComputeWorkgroupSizeZ",
] as const;

/** An open GPU device. */
export class Gpu {
  /** Why it can no longer be used. */
  failure: QccError | undefined;
  private closed = false;

  private constructor(
    readonly device: GPUDevice,
    readonly name: string,
    private readonly onFailure: (error: QccError) => void,
  ) {
    device.addEventListener("uncapturederror", (event) => {
      event.preventDefault();
      this.fail(`the GPU refuses: ${firstLine(event.error.message)}`);
    });
    void device.lost.then((info) => {
      const why = info.reason === "destroyed" ? "it had too little memory" : info.message;
      if (!this.closed) this.fail(`the GPU was lost (${why || "no reason given"})`);
    });
  }

  /** A device with all that is needed, or an error that says what is missing. */
  static async open(needs: Needs, onFailure: (error: QccError) => void): Promise<Gpu> {
    const adapter = await findAdapter();
    const name = nameOf(adapter);
    const missing = needs.features.filter((feature) => !adapter.features.has(feature));
    if (missing.length) {
      const advice = missing.map((feature) => ADVICE[feature]).find(Boolean);
      throw new QccError(
        `the model needs the GPU feature ${missing.join(", ")}, which ${name} lacks` +
          (advice ? `; ${advice}` : ""),
      );
    }
    checkSize(needs, adapter, name);
    const limits = LIMITS.map((limit) => [limit, adapter.limits[limit]]);
    try {
      const device = await adapter.requestDevice({
        requiredFeatures: needs.features as GPUFeatureName[],
        requiredLimits: Object.fromEntries(limits),
      });
      return new Gpu(device, name, onFailure);
    } catch (error) {
      throw new QccError(`${name} cannot be opened: ${messageOf(error)}`);
    }
  }

  /**
   * Run `work`, which submits to the GPU before it first waits: errors of its commands, and all
   * that came before, are thrown instead of wrong numbers returned. `what` begins their message.
   */
  async guard<T>(work: () => Promise<T>, what = "the GPU refuses"): Promise<T> {
    this.check();
    const scopes = ["out-of-memory", "validation", "internal"] as const;
    for (const scope of scopes) this.device.pushErrorScope(scope);
    const result = work();
    const errors = scopes.map(() => this.device.popErrorScope());
    const done = await result.then(
      (value) => ({ value }),
      (reason: unknown) => ({ reason }),
    );
    this.check();
    const found = (await Promise.all(errors)).find((error) => error !== null);
    if (found) throw this.fail(`${what}: ${firstLine(found.message)}`);
    if ("reason" in done) throw done.reason;
    this.check();
    return done.value;
  }

  /** Throw where the device can no longer be used. */
  check(): void {
    if (this.failure) throw this.failure;
    if (this.closed) throw new QccError("the model was closed; load it again");
  }

  /** Take it that the device is useless from now on. */
  fail(message: string): QccError {
    if (!this.failure) {
      this.failure = new QccError(`${message}; reload the page`);
      this.onFailure(this.failure);
    }
    return this.failure;
  }

  close(): void {
    this.closed = true;
    this.device.destroy();
  }
}

async function findAdapter(): Promise<GPUAdapter> {
  if (!navigator.gpu) {
    throw new QccError(
      globalThis.isSecureContext === false
        ? "WebGPU works on https pages and on localhost only; this page came over plain http"
        : "this browser has no WebGPU; use a current Chrome, Edge, Firefox or Safari",
    );
  }
  const adapter = await navigator.gpu.requestAdapter({ powerPreference: "high-performance" });
  if (adapter) return adapter;
  throw new QccError(
    "the browser has WebGPU but offers no GPU; check that hardware acceleration is on, that the " +
      "GPU's driver is installed, and that the browser does not block it",
  );
}

/** Of a shader's error the others show the code. */
function firstLine(text: string): string {
  return text.trim().split("\n")[0]!;
}

function nameOf(adapter: GPUAdapter): string {
  const { description, vendor, architecture } = adapter.info ?? {}; // new in browsers
  return description || [vendor, architecture].filter(Boolean).join(" ") || "this GPU";
}

function checkSize(needs: Needs, adapter: GPUAdapter, name: string): void {
  const { maxBufferSize, maxStorageBufferBindingSize } = adapter.limits;
  const limit = Math.min(maxBufferSize, maxStorageBufferBindingSize);
  if (needs.largest.nbytes <= limit) return;
  const which = limit === maxBufferSize ? "maxBufferSize" : "maxStorageBufferBindingSize";
  throw new QccError(
    `the model is too large for ${name}: ${needs.largest.name} takes ` +
      `${(needs.largest.nbytes / MB).toFixed(1)} MB, one buffer may have ` +
      `${(limit / MB).toFixed(1)} MB (${which}); use a model of fewer bits or with a smaller ` +
      "vocabulary",
  );
}
