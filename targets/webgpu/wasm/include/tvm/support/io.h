// Stand-in for a header of TVM that the wheel leaves out: streams of bytes and of typed values.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tvm {
namespace support {

class Stream;

// How a T lies in a stream: static void Write(Stream*, const T&), static bool Read(Stream*, T*).
template <typename T, typename Enable = void>
struct Serializer;

class Stream {
 public:
  virtual ~Stream() = default;
  virtual size_t Read(void* to, size_t bytes) = 0;         // returns how many there were
  virtual size_t Write(const void* from, size_t bytes) = 0;

  template <typename T>
  bool Read(T* value) {
    return Serializer<T>::Read(this, value);
  }
  template <typename T>
  void Write(const T& value) {
    Serializer<T>::Write(this, value);
  }
  template <typename T>
  bool ReadArray(T* values, size_t count) {
    T* end = values + count;
    while (values != end && Read<T>(values)) ++values;
    return values == end;
  }
  template <typename T>
  void WriteArray(const T* values, size_t count) {
    for (const T* end = values + count; values != end; ++values) Write<T>(*values);
  }
};

}  // namespace support
}  // namespace tvm
