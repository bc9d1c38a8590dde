// TVM's device API for `vulkan` (and `webgpu`): device i is adapter i.
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/reflection/registry.h>
#include <tvm/runtime/device_api.h>

#include <algorithm>
#include <sstream>

#include "gpu.h"

namespace qcc {

namespace ffi = tvm::ffi;
using tvm::Device;
using tvm::runtime::DeviceAPI;
using tvm::runtime::DeviceAttrKind;

namespace {

bool on_gpu(Device device) {
  return device.device_type == kDLVulkan || device.device_type == kDLWebGPU;
}

Buffer* buffer(const void* pointer) {
  auto* buffer = static_cast<Buffer*>(const_cast<void*>(pointer));
  if (!Gpu::owner(buffer)) {
    TVM_FFI_THROW(ValueError) << "no living buffer of a Vulkan device: " << pointer;
  }
  return buffer;
}

Buffer* within(const void* pointer, size_t offset, size_t bytes) {
  Buffer* found = buffer(pointer);
  if (offset > found->size || bytes > found->size - offset) {
    TVM_FFI_THROW(ValueError) << "a copy of " << bytes << " bytes at " << offset
                              << " leaves a buffer of " << found->size << " bytes";
  }
  return found;
}

class WgpuDeviceAPI final : public DeviceAPI {
 public:
  void SetDevice(Device) final {}  // a kernel runs where its buffers lie

  void GetAttr(Device dev, DeviceAttrKind kind, ffi::Any* rv) final {
    auto guard = lock();
    if (kind == tvm::runtime::kExist) {
      bool exists = dev.device_id >= 0 &&
                    dev.device_id < static_cast<int>(Gpu::adapters().size());
      *rv = static_cast<int64_t>(exists);
      return;
    }
    *rv = nullptr;
    const Gpu& gpu = Gpu::get(dev.device_id);
    const WGPULimits& limits = gpu.limits();
    switch (kind) {
      case tvm::runtime::kMaxThreadsPerBlock:
        *rv = static_cast<int64_t>(limits.maxComputeInvocationsPerWorkgroup);
        break;
      case tvm::runtime::kWarpSize:
        if (gpu.subgroup()) *rv = static_cast<int64_t>(gpu.subgroup());
        break;
      case tvm::runtime::kMaxSharedMemoryPerBlock:
        *rv = static_cast<int64_t>(limits.maxComputeWorkgroupStorageSize);
        break;
      case tvm::runtime::kDeviceName:
        *rv = ffi::String(gpu.name());
        break;
      case tvm::runtime::kMaxThreadDimensions: {
        std::ostringstream sizes;
        sizes << "[" << limits.maxComputeWorkgroupSizeX << ", " << limits.maxComputeWorkgroupSizeY
              << ", " << limits.maxComputeWorkgroupSizeZ << "]";
        *rv = ffi::String(sizes.str());
        break;
      }
      case tvm::runtime::kApiVersion:
        *rv = static_cast<int64_t>(wgpuGetVersion());
        break;
      default:
        break;  // WebGPU tells neither clocks nor how much memory there is
    }
  }

  void* AllocDataSpace(Device dev, size_t nbytes, size_t, DLDataType) final {
    auto guard = lock();
    return Gpu::get(dev.device_id).allocate(nbytes);
  }

  void FreeDataSpace(Device, void* pointer) final {
    auto guard = lock();
    Buffer* freed = static_cast<Buffer*>(pointer);
    if (Gpu::owner(freed)) freed->gpu->free(freed);
  }

  void StreamSync(Device dev, TVMStreamHandle) final {
    auto guard = lock();
    Gpu::get(dev.device_id).sync();
  }

  // A part of a matrix that TVM's KV cache fills keeps the matrix's strides; one dimension has none.
  void CopyDataFromTo(DLTensor* from, DLTensor* to, TVMStreamHandle stream) final {
    DLTensor source = *from, target = *to;
    if (source.ndim == 1) source.strides = nullptr;
    if (target.ndim == 1) target.strides = nullptr;
    DeviceAPI::CopyDataFromTo(&source, &target, stream);
  }

  using DeviceAPI::AllocDataSpace;

 protected:
  void CopyDataFromTo(const void* from, size_t from_offset, void* to, size_t to_offset,
                      size_t bytes, Device dev_from, Device dev_to, DLDataType,
                      TVMStreamHandle) final {
    auto guard = lock();
    if (!on_gpu(dev_from)) {
      Buffer* target = within(to, to_offset, bytes);
      target->gpu->write(target, to_offset, static_cast<const char*>(from) + from_offset, bytes);
    } else if (!on_gpu(dev_to)) {
      Buffer* source = within(from, from_offset, bytes);
      source->gpu->read(source, from_offset, static_cast<char*>(to) + to_offset, bytes);
    } else {
      Buffer* source = within(from, from_offset, bytes);
      Buffer* target = within(to, to_offset, bytes);
      if (source->gpu == target->gpu) {
        source->gpu->copy(source, from_offset, target, to_offset, bytes);
      } else {
        std::vector<uint8_t> host(bytes);
        source->gpu->read(source, from_offset, host.data(), bytes);
        target->gpu->write(target, to_offset, host.data(), bytes);
      }
    }
  }
};

bool was_lost(int index) {
  auto guard = lock();
  return Gpu::was_lost(index);
}

void close(int index) {
  auto guard = lock();
  Gpu::get(index).close();
}

void* device_api() {
  static DeviceAPI* api = new WgpuDeviceAPI;
  return api;
}

// Of each adapter, in the order of device ids: name, backend and kind as WebGPU numbers them, and
// what bounds a program.
ffi::Array<ffi::Map<ffi::String, ffi::Any>> adapters() {
  auto guard = lock();
  ffi::Array<ffi::Map<ffi::String, ffi::Any>> list;
  for (WGPUAdapter adapter : Gpu::adapters()) {
    WGPUAdapterInfo info{};
    wgpuAdapterGetInfo(adapter, &info);
    WGPULimits limits{};
    wgpuAdapterGetLimits(adapter, &limits);
    ffi::Map<ffi::String, ffi::Any> entry;
    entry.Set("name", ffi::String(text(info.device)));
    entry.Set("driver", ffi::String(text(info.description)));
    entry.Set("backend", static_cast<int64_t>(info.backendType));
    entry.Set("kind", static_cast<int64_t>(info.adapterType));
    entry.Set("subgroup", static_cast<int64_t>(info.subgroupMinSize));
    entry.Set("max_buffer", static_cast<int64_t>(std::min(limits.maxStorageBufferBindingSize,
                                                          limits.maxBufferSize)));
    entry.Set("max_threads", static_cast<int64_t>(limits.maxComputeInvocationsPerWorkgroup));
    entry.Set("f16", static_cast<bool>(wgpuAdapterHasFeature(adapter, WGPUFeatureName_ShaderF16)));
    wgpuAdapterInfoFreeMembers(info);
    list.push_back(entry);
  }
  return list;
}

ffi::Map<ffi::String, int64_t> counters(int index) {
  auto guard = lock();
  Counters now = Gpu::get(index).counters();
  ffi::Map<ffi::String, int64_t> map;
  map.Set("buffers", static_cast<int64_t>(now.buffers));
  map.Set("bytes", static_cast<int64_t>(now.bytes));
  map.Set("pooled_bytes", static_cast<int64_t>(now.pooled_bytes));
  map.Set("bind_groups", static_cast<int64_t>(now.bind_groups));
  map.Set("dispatches", static_cast<int64_t>(now.dispatches));
  map.Set("submits", static_cast<int64_t>(now.submits));
  return map;
}

void profile(int index, bool on) {
  auto guard = lock();
  Gpu::get(index).profile(on);
}

// Kernel -> [calls, nanoseconds].
ffi::Map<ffi::String, ffi::Array<int64_t>> times(int index) {
  auto guard = lock();
  ffi::Map<ffi::String, ffi::Array<int64_t>> map;
  for (const auto& [name, sums] : Gpu::get(index).times()) {
    map.Set(name, {static_cast<int64_t>(sums.first), static_cast<int64_t>(sums.second)});
  }
  return map;
}

}  // namespace

TVM_FFI_STATIC_INIT_BLOCK() {
  tvm::ffi::reflection::GlobalDef()
      .def("device_api.vulkan", device_api)
      .def("device_api.webgpu", device_api)
      .def("qcc.vulkan.adapters", adapters)
      .def("qcc.vulkan.counters", counters)
      .def("qcc.vulkan.was_lost", was_lost)
      .def("qcc.vulkan.close", close)
      .def("qcc.vulkan.profile", profile)
      .def("qcc.vulkan.times", times);
}

}  // namespace qcc
