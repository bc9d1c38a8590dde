"""qcc.targets.webgpu.wasm: the wasm around a model's kernels.

In the order in which data passes:
  tools.py     emcc, wasm-ld and wasm-opt: where they are, which Debian packages have them
  include/     our stand-ins for headers that the TVM wheel leaves out
  runtime.py   TVM's runtime as one wasm object, built once from the wheel's sources
  link.py      that object and a model's become one wasm module
  contract.py  what a module may import and must export
  export.py    from a compiled VM executable to a library
"""
