// Buffers of one GPU: a pool of freed ones, and copies of any size at any offset.
//
// WebGPU copies whole 4-byte words at offsets of whole words. Where a copy begins or ends within
// a word, the word is read, patched and written.
#include <tvm/ffi/error.h>

#include <algorithm>
#include <cstring>

#include "gpu.h"

namespace qcc {

namespace {

constexpr WGPUBufferUsage kStorage =
    WGPUBufferUsage_Storage | WGPUBufferUsage_CopySrc | WGPUBufferUsage_CopyDst;
constexpr uint64_t kPoolLargest = 1 << 20, kPoolBytes = 64 << 20;
// A piece of a copy, and what may wait in wgpu's staging memory before it is submitted.
constexpr uint64_t kPiece = 16 << 20;
constexpr uint64_t kStagingSmallest = 64 << 10;

struct Mapped {
  bool done = false;
  bool good = false;
  std::string message;
};

// Living buffers of all devices: TVM's pointers are looked up before they are followed.
std::unordered_set<Buffer*>& living() {
  static auto* buffers = new std::unordered_set<Buffer*>;
  return *buffers;
}

}  // namespace

Gpu* Gpu::owner(Buffer* buffer) { return living().count(buffer) ? buffer->gpu : nullptr; }

WGPUBuffer Gpu::create(uint64_t size, WGPUBufferUsage usage) {
  WGPUBufferDescriptor descriptor{};
  descriptor.usage = usage;
  descriptor.size = size;
  return wgpuDeviceCreateBuffer(device_, &descriptor);
}

Buffer* Gpu::allocate(uint64_t bytes) {
  alive("allocating memory");
  uint64_t size = std::max<uint64_t>(round_up(bytes, 4), 4);
  uint64_t most = std::min(limits_.maxStorageBufferBindingSize, limits_.maxBufferSize);
  if (bytes > most) {
    TVM_FFI_THROW(ValueError) << name_ << ": a buffer of " << bytes
                              << " bytes; this adapter binds at most " << most
                              << " bytes: take fewer bits a weight, a smaller context or prefill "
                                 "chunk, or another adapter";
  }
  auto kept = pool_.find(size);
  if (kept != pool_.end() && !kept->second.empty()) {
    Buffer* buffer = kept->second.back();
    kept->second.pop_back();
    pooled_ -= size;
    buffer->used = bytes;
    ++buffers_;
    living().insert(buffer);
    return buffer;
  }
  WGPUBuffer handle = create(size, kStorage);
  if (!error_.empty()) {
    // Out of memory, perhaps: what is freed but kept, or freed and still in use, makes room.
    error_.clear();
    if (handle) wgpuBufferRelease(handle);
    trim();
    sync();
    handle = create(size, kStorage);
    check("allocating " + std::to_string(size) + " bytes");
  }
  auto* buffer = new Buffer;
  buffer->gpu = this;
  buffer->handle = handle;
  buffer->size = size;
  buffer->used = bytes;
  bytes_ += size;
  ++buffers_;
  living().insert(buffer);
  return buffer;
}

void Gpu::free(Buffer* buffer) {
  living().erase(buffer);
  --buffers_;
  if (buffer->size <= kPoolLargest && pooled_ + buffer->size <= kPoolBytes) {
    pool_[buffer->size].push_back(buffer);
    pooled_ += buffer->size;
  } else {
    release(buffer);
  }
}

void Gpu::release(Buffer* buffer) {
  // Not destroyed: wgpu keeps the memory as long as commands on their way name it.
  for (const std::string& key : buffer->groups) {
    auto group = groups_.find(key);
    if (group == groups_.end()) continue;
    wgpuBindGroupRelease(group->second);
    groups_.erase(group);
  }
  bytes_ -= buffer->size;
  wgpuBufferRelease(buffer->handle);
  delete buffer;
}

void Gpu::trim() {
  for (auto& entry : pool_) {
    for (Buffer* buffer : entry.second) release(buffer);
  }
  pool_.clear();
  pooled_ = 0;
}

void Gpu::forget_groups() {
  for (auto& entry : groups_) wgpuBindGroupRelease(entry.second);
  groups_.clear();
  for (Buffer* buffer : living()) {
    if (buffer->gpu == this) buffer->groups.clear();
  }
  for (auto& entry : pool_) {
    for (Buffer* buffer : entry.second) buffer->groups.clear();
  }
}

void Gpu::write_words(Buffer* to, uint64_t offset, const void* data, uint64_t bytes) {
  const auto* from = static_cast<const uint8_t*>(data);
  while (bytes) {
    uint64_t piece = std::min(bytes, kPiece);
    alive("writing a buffer");
    wgpuQueueWriteBuffer(queue_, to->handle, offset, from, piece);
    check("writing a buffer");
    written_ += piece;
    if (written_ >= kPiece) sync();  // frees the staging memory
    offset += piece;
    from += piece;
    bytes -= piece;
  }
}

void Gpu::patch(Buffer* to, uint64_t offset, const void* data, uint64_t bytes) {
  uint8_t word[4];
  uint64_t start = offset / 4 * 4;
  read(to, start, word, 4);
  std::memcpy(word + (offset - start), data, bytes);
  write_words(to, start, word, 4);
}

void Gpu::write(Buffer* to, uint64_t offset, const void* data, uint64_t bytes) {
  if (!bytes) return;
  // The queue would write before the commands that were recorded earlier.
  if (to->batch == batch_) flush();
  const auto* from = static_cast<const uint8_t*>(data);
  if (uint64_t lead = std::min(bytes, (4 - offset % 4) % 4)) {
    patch(to, offset, from, lead);
    offset += lead;
    from += lead;
    bytes -= lead;
  }
  uint64_t words = bytes / 4 * 4, rest = bytes - words;
  write_words(to, offset, from, words);
  if (!rest) return;
  offset += words;
  from += words;
  if (offset + rest < to->used) {
    patch(to, offset, from, rest);
  } else {  // nothing of anybody's follows in this word
    uint8_t word[4] = {};
    std::memcpy(word, from, rest);
    write_words(to, offset, word, 4);
  }
}

void Gpu::read(Buffer* from, uint64_t offset, void* data, uint64_t bytes) {
  alive("reading a buffer");
  auto* to = static_cast<uint8_t*>(data);
  while (bytes) {
    uint64_t start = offset / 4 * 4;
    uint64_t lead = offset - start;
    uint64_t piece = std::min(bytes, kPiece - lead);
    uint64_t size = round_up(lead + piece, 4);
    if (size > staging_size_) {
      if (staging_) wgpuBufferRelease(staging_);
      staging_size_ = kStagingSmallest;
      while (staging_size_ < size) staging_size_ *= 2;
      staging_ = create(staging_size_, WGPUBufferUsage_MapRead | WGPUBufferUsage_CopyDst);
      if (!error_.empty()) staging_size_ = 0;
      check("allocating staging memory");
    }
    end_pass();
    wgpuCommandEncoderCopyBufferToBuffer(encoder(), from->handle, start, staging_, 0, size);
    flush();
    Mapped mapped;
    WGPUBufferMapCallbackInfo callback{};
    callback.mode = WGPUCallbackMode_AllowSpontaneous;
    callback.userdata1 = &mapped;
    callback.callback = [](WGPUMapAsyncStatus status, WGPUStringView message, void* result, void*) {
      *static_cast<Mapped*>(result) = {true, status == WGPUMapAsyncStatus_Success, text(message)};
    };
    wgpuBufferMapAsync(staging_, WGPUMapMode_Read, 0, size, callback);
    wait();
    if (!mapped.good) {
      TVM_FFI_THROW(RuntimeError) << name_ << ": reading a buffer: " << mapped.message;
    }
    std::memcpy(to, static_cast<const uint8_t*>(wgpuBufferGetConstMappedRange(staging_, 0, size)) +
                        lead, piece);
    wgpuBufferUnmap(staging_);
    offset += piece;
    to += piece;
    bytes -= piece;
  }
}

void Gpu::copy(Buffer* from, uint64_t from_offset, Buffer* to, uint64_t to_offset,
               uint64_t bytes) {
  if (!bytes) return;
  // A last word may be copied whole where no bytes of the target's tensor follow in it.
  bool whole = bytes % 4 == 0 || to_offset + bytes >= to->used;
  if (from_offset % 4 || to_offset % 4 || !whole) {
    std::vector<uint8_t> host(bytes);
    read(from, from_offset, host.data(), bytes);
    write(to, to_offset, host.data(), bytes);
    return;
  }
  bytes = round_up(bytes, 4);
  if (from == to) {  // WebGPU copies between two buffers only
    Buffer* between = allocate(bytes);
    copy(from, from_offset, between, 0, bytes);
    copy(between, 0, to, to_offset, bytes);
    free(between);
    return;
  }
  end_pass();
  wgpuCommandEncoderCopyBufferToBuffer(encoder(), from->handle, from_offset, to->handle, to_offset,
                                       bytes);
  from->batch = to->batch = batch_;
}

}  // namespace qcc
