// The time that each dispatch takes on the GPU, from timestamps around its pass.
#include <tvm/ffi/error.h>

#include "gpu.h"

namespace qcc {

void Gpu::profile(bool on) {
  flush();
  if (on && !queries_) {
    if (!wgpuDeviceHasFeature(device_, WGPUFeatureName_TimestampQuery)) {
      TVM_FFI_THROW(RuntimeError) << name_ << ": this adapter has no timestamps";
    }
    WGPUQuerySetDescriptor descriptor{};
    descriptor.type = WGPUQueryType_Timestamp;
    descriptor.count = 2 * kBatch;
    queries_ = wgpuDeviceCreateQuerySet(device_, &descriptor);
    stamps_.gpu = this;
    stamps_.size = stamps_.used = 2 * kBatch * sizeof(uint64_t);
    stamps_.handle = create(stamps_.size, WGPUBufferUsage_QueryResolve | WGPUBufferUsage_CopySrc);
    check("making timestamps");
  }
  if (on) times_.clear();
  profiling_ = on;
}

const std::map<std::string, std::pair<uint64_t, uint64_t>>& Gpu::times() {
  flush();
  return times_;
}

void Gpu::resolve() {
  uint32_t count = static_cast<uint32_t>(2 * batch_names_.size());
  if (count) wgpuCommandEncoderResolveQuerySet(encoder_, queries_, 0, count, stamps_.handle, 0);
}

void Gpu::collect(const std::vector<const std::string*>& names) {
  std::vector<uint64_t> stamps(2 * names.size());
  read(&stamps_, 0, stamps.data(), stamps.size() * sizeof(uint64_t));
  double period = wgpuQueueGetTimestampPeriod(queue_);
  for (size_t i = 0; i < names.size(); ++i) {
    auto& [calls, nanoseconds] = times_[*names[i]];
    ++calls;
    nanoseconds += static_cast<uint64_t>((stamps[2 * i + 1] - stamps[2 * i]) * period);
  }
}

}  // namespace qcc
