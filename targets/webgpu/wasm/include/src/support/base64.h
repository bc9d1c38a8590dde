// Stand-in for a header of TVM that the wheel leaves out: base64 text around another stream.
#pragma once

#include <tvm/ffi/extra/base64.h>
#include <tvm/ffi/string.h>
#include <tvm/support/io.h>

#include <memory>
#include <string>

#include "bytes_io.h"

namespace tvm {
namespace support {

// Keeps what is written; Finish encodes it.
class Base64OutStream : public Stream {
 public:
  explicit Base64OutStream(Stream* to) : to_(to) {}
  using Stream::Read;
  using Stream::Write;
  size_t Read(void*, size_t) final { return 0; }
  size_t Write(const void* from, size_t bytes) final {
    kept_.append(static_cast<const char*>(from), bytes);
    return bytes;
  }
  void Finish() {
    ffi::String text = ffi::Base64Encode(TVMFFIByteArray{kept_.data(), kept_.size()});
    to_->Write(text.data(), text.size());
  }

 private:
  Stream* to_;
  std::string kept_;
};

// InitPosition decodes all that the other stream has.
class Base64InStream : public Stream {
 public:
  explicit Base64InStream(Stream* from) : from_(from) {}
  using Stream::Read;
  using Stream::Write;
  void InitPosition() {
    std::string text;
    char part[4096];
    while (size_t bytes = from_->Read(part, sizeof(part))) text.append(part, bytes);
    decoded_ = ffi::Base64Decode(TVMFFIByteArray{text.data(), text.size()});
    bytes_ = std::make_unique<BytesInStream>(decoded_);
  }
  size_t Read(void* to, size_t bytes) final { return bytes_->Read(to, bytes); }
  size_t Write(const void*, size_t) final { return 0; }

 private:
  Stream* from_;
  ffi::Bytes decoded_;
  std::unique_ptr<BytesInStream> bytes_;
};

}  // namespace support
}  // namespace tvm
