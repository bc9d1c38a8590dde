// Serves WGSL dispatches over stdin and stdout: node dawn.mjs FOLDER, with node_modules in FOLDER.
// A message is the length of a JSON text (uint32), the text, and the bytes of as many buffers as
// its `sizes` has.
// run       {dispatches, sizes} -> {error, sizes} and the buffers afterwards (none after an error)
// validate  {source} -> {error}, by the null backend with shader-f16
import { readSync, writeSync } from "node:fs";
import { createRequire } from "node:module";
import { resolve } from "node:path";

const require = createRequire(resolve(process.argv[2]) + "/");
const { create, globals } = require("webgpu");
Object.assign(globalThis, globals);

const LIMITS = {
  maxStorageBuffersPerShaderStage: 10,
  maxComputeInvocationsPerWorkgroup: 256,
  maxComputeWorkgroupStorageSize: 32 << 10,
  maxStorageBufferBindingSize: 128 << 20,
};
const instances = []; // a collected instance takes its devices along

async function open(flags, requiredFeatures, requiredLimits) {
  const gpu = create(flags);
  const adapter = await gpu.requestAdapter();
  const device = await adapter.requestDevice({ requiredFeatures, requiredLimits });
  instances.push(gpu);
  device.onuncapturederror = (event) => console.error(`uncaptured: ${event.error.message}`);
  return device;
}

const swiftshader = once(() => open(["adapter=SwiftShader Device (Subzero)"], [], LIMITS));
const nothing = once(() => open(["backend=null"], ["shader-f16"], undefined));

function once(make) {
  let made;
  return () => (made ??= make());
}

// What the device says against `work`, or "".
async function errorOf(device, work) {
  const filters = ["out-of-memory", "internal", "validation"];
  for (const filter of filters) device.pushErrorScope(filter);
  let thrown = "";
  try {
    await work();
  } catch (error) {
    thrown = String(error);
  }
  const errors = [];
  for (const _ of filters) errors.push(await device.popErrorScope());
  return [...errors.filter(Boolean).map((error) => error.message), thrown].filter(Boolean).join("\n");
}

const pipelines = new Map();

function pipelineOf(device, { source, name, writable }) {
  if (!pipelines.has(source)) {
    const types = [...writable.map((each) => (each ? "storage" : "read-only-storage")), "uniform"];
    const layout = device.createBindGroupLayout({
      entries: types.map((type, binding) => ({
        binding,
        visibility: GPUShaderStage.COMPUTE,
        buffer: { type },
      })),
    });
    const pipeline = device.createComputePipeline({
      layout: device.createPipelineLayout({ bindGroupLayouts: [layout] }),
      compute: { module: device.createShaderModule({ code: source }), entryPoint: name },
    });
    pipelines.set(source, { layout, pipeline });
  }
  return pipelines.get(source);
}

function bufferOf(device, bytes, usage) {
  const buffer = device.createBuffer({ size: bytes.length, usage, mappedAtCreation: true });
  new Uint8Array(buffer.getMappedRange()).set(bytes);
  buffer.unmap();
  return buffer;
}

function dispatch(device, buffers, each) {
  const { layout, pipeline } = pipelineOf(device, each);
  const uniform = bufferOf(device, Uint8Array.from(each.uniform), GPUBufferUsage.UNIFORM);
  const bound = [...each.buffers.map((number) => buffers[number]), uniform];
  const encoder = device.createCommandEncoder();
  const pass = encoder.beginComputePass();
  pass.setPipeline(pipeline);
  const entries = bound.map((buffer, binding) => ({ binding, resource: { buffer } }));
  pass.setBindGroup(0, device.createBindGroup({ layout, entries }));
  pass.dispatchWorkgroups(...each.grid);
  pass.end();
  device.queue.submit([encoder.finish()]);
}

async function contentOf(device, buffer) {
  const usage = GPUBufferUsage.COPY_DST | GPUBufferUsage.MAP_READ;
  const copy = device.createBuffer({ size: buffer.size, usage });
  const encoder = device.createCommandEncoder();
  encoder.copyBufferToBuffer(buffer, 0, copy, 0, buffer.size);
  device.queue.submit([encoder.finish()]);
  await copy.mapAsync(GPUMapMode.READ);
  const bytes = new Uint8Array(copy.getMappedRange().slice(0));
  copy.destroy();
  return bytes;
}

async function run({ dispatches }, contents) {
  const device = await swiftshader();
  let after = [];
  const error = await errorOf(device, async () => {
    const usage = GPUBufferUsage.STORAGE | GPUBufferUsage.COPY_SRC;
    const buffers = contents.map((bytes) => bufferOf(device, bytes, usage));
    for (const each of dispatches) dispatch(device, buffers, each);
    after = await Promise.all(buffers.map((buffer) => contentOf(device, buffer)));
    for (const buffer of buffers) buffer.destroy();
  });
  if (error) pipelines.clear();
  return { error, contents: error ? [] : after };
}

async function validate({ source }) {
  const device = await nothing();
  const error = await errorOf(device, async () => {
    const module = device.createShaderModule({ code: source });
    device.createComputePipeline({ layout: "auto", compute: { module } });
  });
  return { error, contents: [] };
}

function read(size) {
  const bytes = Buffer.alloc(size);
  for (let done = 0; done < size; ) {
    const count = readSync(0, bytes, done, size - done, null);
    if (count === 0) process.exit(0);
    done += count;
  }
  return bytes;
}

function write(bytes) {
  for (let done = 0; done < bytes.length; ) done += writeSync(1, bytes, done);
}

for (;;) {
  const request = JSON.parse(read(read(4).readUInt32LE()).toString("utf-8"));
  const contents = request.sizes.map(read);
  const answer = await { run, validate }[request.do](request, contents);
  const sizes = answer.contents.map((bytes) => bytes.length);
  const header = Buffer.from(JSON.stringify({ error: answer.error, sizes }));
  const length = Buffer.alloc(4);
  length.writeUInt32LE(header.length);
  write(length);
  write(header);
  answer.contents.forEach(write);
}
