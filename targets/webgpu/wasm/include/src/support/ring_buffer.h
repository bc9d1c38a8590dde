// Stand-in for a header of TVM that the wheel leaves out: a queue of bytes.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <vector>

namespace tvm {
namespace support {

// Bytes wait at [head_, bytes_.size()); what was read goes when the next write comes.
class RingBuffer {
 public:
  size_t bytes_available() const { return bytes_.size() - head_; }
  void Reserve(size_t bytes) { bytes_.reserve(head_ + bytes); }

  size_t Read(void* to, size_t bytes) {
    return ReadWithCallback(
        [to](const char* from, size_t have) {
          std::memcpy(to, from, have);
          return have;
        },
        bytes);
  }
  void Write(const void* from, size_t bytes) {
    DropRead();
    const char* first = static_cast<const char*>(from);
    bytes_.insert(bytes_.end(), first, first + bytes);
  }
  // take(const char*, size_t) -> how many of them it took
  template <typename Take>
  size_t ReadWithCallback(Take take, size_t most) {
    size_t taken = take(bytes_.data() + head_, std::min(most, bytes_available()));
    head_ += taken;
    return taken;
  }
  // fill(char*, size_t) -> how many it filled
  template <typename Fill>
  size_t WriteWithCallback(Fill fill, size_t most) {
    DropRead();
    size_t before = bytes_.size();
    bytes_.resize(before + most);
    size_t filled = fill(bytes_.data() + before, most);
    bytes_.resize(before + filled);
    return filled;
  }

 private:
  void DropRead() {
    bytes_.erase(bytes_.begin(), bytes_.begin() + head_);
    head_ = 0;
  }

  std::vector<char> bytes_;
  size_t head_ = 0;
};

}  // namespace support
}  // namespace tvm
