"""qcc.runtime.native: the parts of the runtime in C++, built on first use.

build.py       compile the sources once for each state of them, of TVM and of wgpu
vulkan.py      load the library, list the adapters
gpu.h gpu.cc   one adapter: its device, its errors, the commands that wait for submission
buffers.cc     its buffers: a pool, copies of any size and offset
kernels.cc     its pipelines and bind groups
timing.cc      the time that each of them takes
module.cc      the WGSL kernels of a compiled library
device_api.cc  TVM's device API over all of it
"""
