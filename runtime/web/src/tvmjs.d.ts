/** What we use of TVM's web runtime, which the build takes from the installed wheel. */

declare module "tvmjs" {
  export interface Disposable {
    dispose(): void;
  }
  export interface TVMObject extends Disposable {
    getHandle(): number;
  }
  export type PackedFunc = ((...args: unknown[]) => unknown) & Disposable;
  export interface DLDevice {
    sync(): Promise<void>;
  }
  export interface Scalar {
    value: number;
  }
  export interface Tensor extends TVMObject {
    shape: number[];
    dtype: string;
    view(shape: number[]): Tensor;
    copyFrom(data: Tensor | Int32Array): this;
    copyFromRawBytes(data: Uint8Array): this;
    toRawBytes(): Uint8Array<ArrayBuffer>;
  }
  export interface TVMArray extends TVMObject {
    size(): number;
    get(index: number): TVMObject;
  }
  export interface Module extends TVMObject {
    getFunction(name: string): PackedFunc;
  }
  export interface VirtualMachine extends Disposable {
    getFunction(name: string): PackedFunc;
    getInternalModule(): Module;
  }
  export interface Instance extends Disposable {
    beginScope(): void;
    endScope(): void;
    detachFromCurrentScope<T extends Disposable>(object: T): T;
    initWebGPU(device: GPUDevice): void;
    asyncLoadWebGPUPipelines(
      module: { getFunction(name: string): (...args: unknown[]) => unknown },
    ): Promise<void>;
    createVirtualMachine(device: DLDevice): VirtualMachine;
    getGlobalFunc(name: string): PackedFunc;
    webgpu(): DLDevice;
    cpu(): DLDevice;
    empty(shape: number[], dtype: string, device: DLDevice): Tensor;
    makeShapeTuple(shape: number[]): TVMObject;
    makeTVMArray(items: TVMObject[]): TVMArray;
    scalar(value: number, dtype: string): Scalar;
    runtimeStatsText(): string;
  }
  export function instantiate(
    wasm: ArrayBuffer, imports: object, log: (text: string) => void,
  ): Promise<Instance>;
}
