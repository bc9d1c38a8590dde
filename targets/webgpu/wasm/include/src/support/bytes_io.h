// Stand-in for a header of TVM that the wheel leaves out: streams over bytes in memory.
#pragma once

#include <tvm/support/io.h>

#include <algorithm>
#include <cstring>
#include <string>

namespace tvm {
namespace support {

// Reads bytes that its maker keeps alive.
class BytesInStream : public Stream {
 public:
  template <typename Bytes>  // std::string, ffi::Bytes
  explicit BytesInStream(const Bytes& bytes) : next_(bytes.data()), left_(bytes.size()) {}
  using Stream::Read;
  using Stream::Write;
  size_t Read(void* to, size_t bytes) final {
    bytes = std::min(bytes, left_);
    if (bytes != 0) std::memcpy(to, next_, bytes);
    next_ += bytes;
    left_ -= bytes;
    return bytes;
  }
  size_t Write(const void*, size_t) final { return 0; }

 private:
  const char* next_;
  size_t left_;
};

// Appends to a string of its maker.
class BytesOutStream : public Stream {
 public:
  explicit BytesOutStream(std::string* to) : to_(to) {}
  using Stream::Read;
  using Stream::Write;
  size_t Read(void*, size_t) final { return 0; }
  size_t Write(const void* from, size_t bytes) final {
    to_->append(static_cast<const char*>(from), bytes);
    return bytes;
  }

 private:
  std::string* to_;
};

}  // namespace support
}  // namespace tvm
