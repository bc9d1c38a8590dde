// One adapter of wgpu-native: its device, buffers, kernels and the commands not yet submitted.
//
// Nothing here locks: whoever calls holds `lock()`. What the GPU or the driver refuses is thrown
// as a TVM error. wgpu-native aborts the process where a submission is refused, so a batch of
// commands is submitted only after it was encoded without an error.
#pragma once

#include <webgpu.h>
#include <wgpu.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

namespace qcc {

class Gpu;

// The one mutex of this library.
std::unique_lock<std::mutex> lock();

// Dispatches in one submission at most: enough to hide what a submission costs (some 30 us), few
// enough that the GPU begins while the rest is being recorded.
constexpr uint64_t kBatch = 256;

inline WGPUStringView view(const std::string& text) { return {text.data(), text.size()}; }
std::string text(WGPUStringView view);
inline uint64_t round_up(uint64_t value, uint64_t unit) { return (value + unit - 1) / unit * unit; }

// What TVM holds as the data pointer of a tensor. `size` is a multiple of 4, of which the first
// `used` bytes were asked for.
struct Buffer {
  Gpu* gpu = nullptr;
  WGPUBuffer handle = nullptr;
  uint64_t size = 0;
  uint64_t used = 0;
  uint64_t batch = 0;                // the last batch of commands that names it
  std::vector<std::string> groups;   // keys of the bind groups that name it
};

// The arguments of a kernel as the shader sees them: buffers at bindings 0.., then one uniform
// block of 4-byte words. Kernels of the same interface share layouts and bind groups.
struct Layout {
  std::string key;
  std::vector<bool> writes;
  uint32_t uniform_bytes = 0;
  WGPUBindGroupLayout group = nullptr;
  WGPUPipelineLayout pipeline = nullptr;
};

struct Counters {
  uint64_t buffers = 0, bytes = 0, pooled_bytes = 0, bind_groups = 0;
  uint64_t dispatches = 0, submits = 0;
};

class Gpu {
 public:
  // Adapters that can compute, the best kind first: discrete, integrated, others, CPU.
  static const std::vector<WGPUAdapter>& adapters();
  // The device of adapter `index`, opened on first use and again after it was lost; throws where
  // there is none. Tensors of a lost device stay lost.
  static Gpu& get(int index);
  // Whether a device of adapter `index` was lost since this was asked last.
  static bool was_lost(int index);
  // End the device as a lost one ends: what it holds is gone.
  void close();

  Buffer* allocate(uint64_t bytes);
  void free(Buffer* buffer);
  // The device of a living buffer; null for any other pointer.
  static Gpu* owner(Buffer* buffer);

  void write(Buffer* to, uint64_t offset, const void* data, uint64_t bytes);
  void read(Buffer* from, uint64_t offset, void* data, uint64_t bytes);
  void copy(Buffer* from, uint64_t from_offset, Buffer* to, uint64_t to_offset, uint64_t bytes);

  const Layout& layout(const std::vector<bool>& writes, uint32_t uniform_bytes);
  WGPUComputePipeline compile(const std::string& name, const std::string& code, const Layout& on);
  void dispatch(const std::string& name, WGPUComputePipeline pipeline, const Layout& layout,
                const std::vector<Buffer*>& buffers, const uint32_t* uniforms,
                const uint32_t grid[3]);

  // Hand over the commands that wait; `sync` also waits until the GPU has done them.
  void flush();
  void sync();

  // Time each dispatch from now on, in a pass of its own; `times` tells calls and nanoseconds by
  // kernel since then. Throws where the adapter has no timestamps.
  void profile(bool on);
  const std::map<std::string, std::pair<uint64_t, uint64_t>>& times();

  const WGPULimits& limits() const { return limits_; }
  // Why the device is lost; empty: it is not.
  const std::string& lost() const { return lost_; }
  const std::string& name() const { return name_; }
  uint32_t subgroup() const { return subgroup_; }
  Counters counters() const;

 private:
  Gpu(WGPUAdapter adapter, int index);
  // The open device of adapter `index`, if there is one; one that was lost is forgotten.
  static Gpu* open(int index);
  // Throw what wgpu-native reported since the last check, if anything.
  void check(const std::string& doing);
  void alive(const std::string& doing);
  WGPUBuffer create(uint64_t size, WGPUBufferUsage usage);
  void release(Buffer* buffer);
  void trim();
  void forget_groups();
  void begin_pass();
  void end_pass();
  void resolve();
  void collect(const std::vector<const std::string*>& names);
  WGPUCommandEncoder encoder();
  void discard();
  void submit(WGPUCommandBuffer commands);
  void wait();
  void write_words(Buffer* to, uint64_t offset, const void* data, uint64_t bytes);
  void patch(Buffer* to, uint64_t offset, const void* data, uint64_t bytes);
  WGPUBindGroup group(const Layout& layout, const std::vector<Buffer*>& buffers);

  WGPUDevice device_ = nullptr;
  WGPUQueue queue_ = nullptr;
  WGPULimits limits_{};
  std::string name_;
  uint32_t subgroup_ = 0;
  std::string error_, lost_;

  std::unordered_map<uint64_t, std::vector<Buffer*>> pool_;
  uint64_t buffers_ = 0, bytes_ = 0, pooled_ = 0;

  WGPUCommandEncoder encoder_ = nullptr;
  WGPUComputePassEncoder pass_ = nullptr;
  std::vector<const std::string*> batch_names_;
  uint64_t batch_ = 1;
  uint64_t written_ = 0;  // bytes that wait in wgpu's own staging memory
  WGPUSubmissionIndex last_ = 0;

  WGPUBuffer uniform_ = nullptr;
  uint64_t uniform_size_ = 0;
  std::vector<uint8_t> uniforms_;
  WGPUBuffer staging_ = nullptr;
  uint64_t staging_size_ = 0;

  std::unordered_map<std::string, Layout> layouts_;
  std::unordered_map<std::string, WGPUBindGroup> groups_;
  uint64_t dispatches_ = 0, submits_ = 0;

  bool profiling_ = false;
  WGPUQuerySet queries_ = nullptr;
  Buffer stamps_;
  std::map<std::string, std::pair<uint64_t, uint64_t>> times_;
};

}  // namespace qcc
