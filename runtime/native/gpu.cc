// Adapters, devices, errors, and the batch of commands on its way to the GPU.
#include "gpu.h"

#include <tvm/ffi/error.h>

#include <algorithm>
#include <set>

namespace qcc {

namespace {

constexpr uint64_t kUniform = 64;  // bytes of a uniform block, where its alignment is less

int rank(WGPUAdapter adapter) {
  WGPUAdapterInfo info{};
  wgpuAdapterGetInfo(adapter, &info);
  int place = info.adapterType == WGPUAdapterType_DiscreteGPU     ? 0
              : info.adapterType == WGPUAdapterType_IntegratedGPU ? 1
              : info.adapterType == WGPUAdapterType_CPU           ? 3
                                                                  : 2;
  wgpuAdapterInfoFreeMembers(info);
  return place;
}

struct Answer {
  WGPUDevice device = nullptr;
  std::string message;
};

// Never destroyed: tensors may outlive the end of main.
std::map<int, Gpu*>& devices() {
  static auto* all = new std::map<int, Gpu*>;
  return *all;
}

std::set<int>& losses() {
  static auto* all = new std::set<int>;
  return *all;
}

}  // namespace

std::unique_lock<std::mutex> lock() {
  static std::mutex* mutex = new std::mutex;
  return std::unique_lock<std::mutex>(*mutex);
}

std::string text(WGPUStringView view) {
  if (!view.data) return "";
  return view.length == WGPU_STRLEN ? view.data : std::string(view.data, view.length);
}

const std::vector<WGPUAdapter>& Gpu::adapters() {
  static auto* found = [] {
    WGPUInstanceExtras extras{};
    extras.chain.sType = static_cast<WGPUSType>(WGPUSType_InstanceExtras);
    extras.backends =
        WGPUInstanceBackend_Vulkan | WGPUInstanceBackend_Metal | WGPUInstanceBackend_DX12;
    extras.flags = WGPUInstanceFlag_Empty;
    WGPUInstanceDescriptor descriptor{};
    descriptor.nextInChain = &extras.chain;
    WGPUInstance instance = wgpuCreateInstance(&descriptor);
    auto* list = new std::vector<WGPUAdapter>;
    if (!instance) return list;
    list->resize(wgpuInstanceEnumerateAdapters(instance, nullptr, nullptr));
    wgpuInstanceEnumerateAdapters(instance, nullptr, list->data());
    std::stable_sort(list->begin(), list->end(),
                     [](WGPUAdapter a, WGPUAdapter b) { return rank(a) < rank(b); });
    return list;
  }();
  return *found;
}

Gpu* Gpu::open(int index) {
  auto known = devices().find(index);
  if (known == devices().end()) return nullptr;
  if (known->second->lost_.empty()) return known->second;
  losses().insert(index);
  devices().erase(known);
  return nullptr;
}

bool Gpu::was_lost(int index) {
  open(index);
  return losses().erase(index) > 0;
}

Gpu& Gpu::get(int index) {
  if (Gpu* known = open(index)) return *known;
  int count = static_cast<int>(adapters().size());
  if (index < 0 || index >= count) {
    TVM_FFI_THROW(ValueError) << "vulkan:" << index << ": this machine has " << count
                              << " Vulkan adapters";
  }
  return *(devices()[index] = new Gpu(adapters()[index], index));
}

Gpu::Gpu(WGPUAdapter adapter, int index) {
  WGPUAdapterInfo info{};
  wgpuAdapterGetInfo(adapter, &info);
  name_ = text(info.device);
  subgroup_ = info.subgroupMinSize;
  wgpuAdapterInfoFreeMembers(info);
  wgpuAdapterGetLimits(adapter, &limits_);
  limits_.nextInChain = nullptr;

  std::vector<WGPUFeatureName> features;
  for (WGPUFeatureName feature : {WGPUFeatureName_ShaderF16, WGPUFeatureName_TimestampQuery}) {
    if (wgpuAdapterHasFeature(adapter, feature)) features.push_back(feature);
  }
  WGPUDeviceDescriptor descriptor{};
  descriptor.requiredFeatureCount = features.size();
  descriptor.requiredFeatures = features.data();
  descriptor.requiredLimits = &limits_;
  descriptor.deviceLostCallbackInfo.mode = WGPUCallbackMode_AllowSpontaneous;
  descriptor.deviceLostCallbackInfo.userdata1 = this;
  descriptor.deviceLostCallbackInfo.callback = [](WGPUDevice const*, WGPUDeviceLostReason,
                                                  WGPUStringView message, void* self, void*) {
    static_cast<Gpu*>(self)->lost_ = "the device is lost: " + text(message);
  };
  descriptor.uncapturedErrorCallbackInfo.userdata1 = this;
  descriptor.uncapturedErrorCallbackInfo.callback = [](WGPUDevice const*, WGPUErrorType,
                                                       WGPUStringView message, void* self, void*) {
    std::string& error = static_cast<Gpu*>(self)->error_;
    if (error.empty()) error = text(message);  // the first one is the cause of the others
  };
  Answer answer;
  WGPURequestDeviceCallbackInfo callback{};
  callback.mode = WGPUCallbackMode_AllowSpontaneous;
  callback.userdata1 = &answer;
  callback.callback = [](WGPURequestDeviceStatus, WGPUDevice device, WGPUStringView message,
                         void* result, void*) {
    *static_cast<Answer*>(result) = {device, text(message)};
  };
  wgpuAdapterRequestDevice(adapter, &descriptor, callback);
  if (!answer.device) {
    TVM_FFI_THROW(RuntimeError) << "vulkan:" << index << " (" << name_
                                << ") does not open: " << answer.message;
  }
  device_ = answer.device;
  queue_ = wgpuDeviceGetQueue(device_);
  uniform_size_ = kBatch * std::max<uint64_t>(limits_.minUniformBufferOffsetAlignment, kUniform);
  uniform_ = create(uniform_size_, WGPUBufferUsage_Uniform | WGPUBufferUsage_CopyDst);
  check("allocating uniforms");
}

void Gpu::close() {
  end_pass();
  discard();
  wgpuDeviceDestroy(device_);
  wgpuDevicePoll(device_, false, nullptr);
  if (lost_.empty()) lost_ = "the device is lost: it was closed";
}

void Gpu::alive(const std::string& doing) {
  if (!lost_.empty()) TVM_FFI_THROW(RuntimeError) << name_ << ": " << doing << ": " << lost_;
}

void Gpu::check(const std::string& doing) {
  alive(doing);
  if (error_.empty()) return;
  std::string message = std::exchange(error_, "");
  TVM_FFI_THROW(RuntimeError) << name_ << ": " << doing << ": " << message;
}

WGPUCommandEncoder Gpu::encoder() {
  if (!encoder_) {
    alive("recording commands");
    encoder_ = wgpuDeviceCreateCommandEncoder(device_, nullptr);
  }
  return encoder_;
}

void Gpu::begin_pass() {
  if (profiling_) end_pass();
  if (pass_) return;
  uint32_t stamp = static_cast<uint32_t>(2 * batch_names_.size());
  WGPUPassTimestampWrites stamps{nullptr, queries_, stamp, stamp + 1};
  WGPUComputePassDescriptor timed{};
  timed.timestampWrites = &stamps;
  pass_ = wgpuCommandEncoderBeginComputePass(encoder(), profiling_ ? &timed : nullptr);
}

void Gpu::end_pass() {
  if (!pass_) return;
  wgpuComputePassEncoderEnd(pass_);
  wgpuComputePassEncoderRelease(pass_);
  pass_ = nullptr;
}

void Gpu::dispatch(const std::string& name, WGPUComputePipeline pipeline, const Layout& layout,
                   const std::vector<Buffer*>& buffers, const uint32_t* uniforms,
                   const uint32_t grid[3]) {
  for (int axis = 0; axis < 3; ++axis) {
    if (grid[axis] == 0) return;
    if (grid[axis] > limits_.maxComputeWorkgroupsPerDimension) {
      TVM_FFI_THROW(ValueError) << "kernel " << name << ": a grid of " << grid[0] << " x "
                                << grid[1] << " x " << grid[2] << " workgroups; " << name_
                                << " takes at most " << limits_.maxComputeWorkgroupsPerDimension
                                << " a dimension";
    }
  }
  if (!lost_.empty()) alive("kernel " + name);
  uint64_t slot = round_up(layout.uniform_bytes, limits_.minUniformBufferOffsetAlignment);
  if (batch_names_.size() == kBatch || uniforms_.size() + slot > uniform_size_) flush();
  WGPUBindGroup bound = group(layout, buffers);
  begin_pass();
  uint32_t offset = static_cast<uint32_t>(uniforms_.size());
  const auto* bytes = reinterpret_cast<const uint8_t*>(uniforms);
  uniforms_.insert(uniforms_.end(), bytes, bytes + layout.uniform_bytes);
  uniforms_.resize(offset + slot);
  wgpuComputePassEncoderSetPipeline(pass_, pipeline);
  wgpuComputePassEncoderSetBindGroup(pass_, 0, bound, 1, &offset);
  wgpuComputePassEncoderDispatchWorkgroups(pass_, grid[0], grid[1], grid[2]);
  for (Buffer* buffer : buffers) buffer->batch = batch_;
  batch_names_.push_back(&name);
  ++dispatches_;
}

void Gpu::discard() {
  if (encoder_) wgpuCommandEncoderRelease(encoder_);
  encoder_ = nullptr;
  uniforms_.clear();
  batch_names_.clear();
  ++batch_;
}

void Gpu::submit(WGPUCommandBuffer commands) {
  alive("submitting commands");
  last_ = wgpuQueueSubmitForIndex(queue_, commands ? 1 : 0, commands ? &commands : nullptr);
  if (commands) wgpuCommandBufferRelease(commands);
  written_ = 0;
  ++submits_;
}

void Gpu::flush() {
  if (!encoder_) {
    if (written_) submit(nullptr);
    return;
  }
  end_pass();
  if (!uniforms_.empty()) {
    // The order of the queue keeps these from what an earlier batch still reads.
    wgpuQueueWriteBuffer(queue_, uniform_, 0, uniforms_.data(), round_up(uniforms_.size(), 4));
  }
  if (profiling_) resolve();
  WGPUCommandBuffer commands = wgpuCommandEncoderFinish(encoder_, nullptr);
  if (!error_.empty() || !lost_.empty()) {
    std::string names;
    for (const std::string* name : batch_names_) {
      if (names.find(*name) == std::string::npos) names += (names.empty() ? "" : ", ") + *name;
    }
    if (commands) wgpuCommandBufferRelease(commands);
    discard();
    check("commands of kernels " + names);
  }
  std::vector<const std::string*> names = batch_names_;
  discard();
  submit(commands);
  if (profiling_) collect(names);
}

void Gpu::wait() {
  wgpuDevicePoll(device_, true, submits_ ? &last_ : nullptr);
  check("waiting for the GPU");
}

void Gpu::sync() {
  flush();
  wait();
}

Counters Gpu::counters() const {
  Counters now;
  now.buffers = buffers_;
  now.bytes = bytes_;
  now.pooled_bytes = pooled_;
  now.bind_groups = groups_.size();
  now.dispatches = dispatches_;
  now.submits = submits_;
  return now;
}

}  // namespace qcc
