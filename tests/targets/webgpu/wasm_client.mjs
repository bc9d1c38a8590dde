// Loads a wasm library with the JavaScript that stock WebLLM has in it, under node, without a GPU.
//
// node wasm_client.mjs CLIENT.mjs LIBRARY.wasm ACTION: prints what the action found, as JSON.
import fs from "node:fs";

// The client takes node for the CommonJS one.
globalThis.__dirname = "";
globalThis.module = {};

const [client, library, action] = process.argv.slice(2);
const bytes = fs.readFileSync(library);
const { tvmjs } = await import(client);

async function instantiate() {
  const wasi = tvmjs.createPolyfillWASI();
  const instance = await tvmjs.instantiate(bytes, wasi, () => {});
  instance.beginScope();
  instance.registerFunc("wasm.WebGPUCreateShader", () => {
    throw new Error("there is no GPU");
  });
  return instance;
}

// What a function throws, as text; "" where it throws nothing.
function thrown(run) {
  try {
    run();
    return "";
  } catch (error) {
    return `${error.constructor.name}: ${error.message}`;
  }
}

const ACTIONS = {
  // What the module imports and exports, as the engine itself reads it.
  names() {
    const compiled = new WebAssembly.Module(bytes);
    return {
      imports: WebAssembly.Module.imports(compiled).map((item) => `${item.module}.${item.name}`),
      exports: WebAssembly.Module.exports(compiled).map((item) => item.name),
    };
  },

  // The functions that the client's source looks up, and those that the runtime has.
  async lookups() {
    const source = fs.readFileSync(client, "utf8");
    const wanted = [...source.matchAll(/getGlobalFunc\("([\w.]+)"\)/g)].map((match) => match[1]);
    const instance = await instantiate();
    return { wanted, registered: instance.listGlobalFuncNames() };
  },

  // _metadata() of a library for WebGPU, and its kernel, which cannot run.
  async metadata() {
    const instance = await instantiate();
    const machine = instance.createVirtualMachine(instance.cpu());
    return { metadata: machine.getFunction("_metadata")() };
  },

  // A library for the CPU of the wasm: numbers, then every error that there can be, then numbers.
  async numbers() {
    const instance = await instantiate();
    const machine = instance.createVirtualMachine(instance.cpu());
    const curve = machine.getFunction("curve");
    const x = instance.empty([5], "float32", instance.cpu()).copyFrom([0, 1, -2, 0.25, 30]);
    const before = Array.from(curve(x).toArray());
    const call = instance.getGlobalFunc("tvmjs.testing.call");
    instance.registerFunc("ours.fails", () => {
      throw new Error("the device is lost");
    });
    const errors = {
      count: thrown(() => curve(x, x)),
      type: thrown(() => curve("text")),
      callback: thrown(() => call(instance.getGlobalFunc("ours.fails"))),
    };
    return { before, errors, after: Array.from(curve(x).toArray()) };
  },
};

console.log(JSON.stringify(await ACTIONS[action]()));
process.exit(0);
