// Layouts, pipelines and bind groups of one GPU, each made once.
#include <tvm/ffi/error.h>

#include "gpu.h"

namespace qcc {

namespace {

constexpr size_t kMostGroups = 8192;

}  // namespace

const Layout& Gpu::layout(const std::vector<bool>& writes, uint32_t uniform_bytes) {
  std::string key = std::to_string(uniform_bytes) + ":";
  for (bool write : writes) key += write ? 'w' : 'r';
  auto known = layouts_.find(key);
  if (known != layouts_.end()) return known->second;

  std::vector<WGPUBindGroupLayoutEntry> entries(writes.size() + 1);
  for (size_t i = 0; i < entries.size(); ++i) {
    entries[i].binding = static_cast<uint32_t>(i);
    entries[i].visibility = WGPUShaderStage_Compute;
    if (i == writes.size()) {
      entries[i].buffer.type = WGPUBufferBindingType_Uniform;
      entries[i].buffer.hasDynamicOffset = true;
      entries[i].buffer.minBindingSize = uniform_bytes;
    } else {
      entries[i].buffer.type =
          writes[i] ? WGPUBufferBindingType_Storage : WGPUBufferBindingType_ReadOnlyStorage;
    }
  }
  WGPUBindGroupLayoutDescriptor group{};
  group.entryCount = entries.size();
  group.entries = entries.data();
  Layout made;
  made.key = key;
  made.writes = writes;
  made.uniform_bytes = uniform_bytes;
  made.group = wgpuDeviceCreateBindGroupLayout(device_, &group);
  WGPUPipelineLayoutDescriptor pipeline{};
  pipeline.bindGroupLayoutCount = 1;
  pipeline.bindGroupLayouts = &made.group;
  if (error_.empty()) made.pipeline = wgpuDeviceCreatePipelineLayout(device_, &pipeline);
  check("the layout " + key);
  return layouts_.emplace(key, std::move(made)).first->second;
}

WGPUComputePipeline Gpu::compile(const std::string& name, const std::string& code,
                                 const Layout& on) {
  if (on.writes.size() > limits_.maxStorageBuffersPerShaderStage) {
    TVM_FFI_THROW(ValueError) << "kernel " << name << ": " << on.writes.size()
                              << " buffers; " << name_ << " binds at most "
                              << limits_.maxStorageBuffersPerShaderStage;
  }
  WGPUShaderSourceWGSL source{};
  source.chain.sType = WGPUSType_ShaderSourceWGSL;
  source.code = view(code);
  WGPUShaderModuleDescriptor shader{};
  shader.nextInChain = &source.chain;
  shader.label = view(name);
  // Loops of TVM's kernels end; the counters that would make sure of it slow down every one.
  WGPUShaderModule module =
      wgpuDeviceCreateShaderModuleTrusted(device_, &shader, WGPUShaderRuntimeChecks_BoundsChecks);
  check("kernel " + name);
  WGPUComputePipelineDescriptor descriptor{};
  descriptor.label = view(name);
  descriptor.layout = on.pipeline;
  descriptor.compute.module = module;
  descriptor.compute.entryPoint = view(name);
  WGPUComputePipeline pipeline = wgpuDeviceCreateComputePipeline(device_, &descriptor);
  wgpuShaderModuleRelease(module);
  check("kernel " + name);
  return pipeline;
}

WGPUBindGroup Gpu::group(const Layout& layout, const std::vector<Buffer*>& buffers) {
  std::string key = layout.key;
  size_t lead = key.size();
  key.resize(lead + buffers.size() * sizeof(Buffer*));
  key.replace(lead, std::string::npos, reinterpret_cast<const char*>(buffers.data()),
              buffers.size() * sizeof(Buffer*));
  auto known = groups_.find(key);
  if (known != groups_.end()) return known->second;
  if (groups_.size() >= kMostGroups) forget_groups();
  std::vector<WGPUBindGroupEntry> entries(buffers.size() + 1);
  for (size_t i = 0; i < entries.size(); ++i) {
    bool uniform = i == buffers.size();
    entries[i].binding = static_cast<uint32_t>(i);
    entries[i].buffer = uniform ? uniform_ : buffers[i]->handle;
    entries[i].size = uniform ? layout.uniform_bytes : buffers[i]->size;
  }
  WGPUBindGroupDescriptor descriptor{};
  descriptor.layout = layout.group;
  descriptor.entryCount = entries.size();
  descriptor.entries = entries.data();
  WGPUBindGroup made = wgpuDeviceCreateBindGroup(device_, &descriptor);
  check("binding buffers");
  groups_.emplace(key, made);
  for (Buffer* buffer : buffers) buffer->groups.push_back(key);
  return made;
}

}  // namespace qcc
