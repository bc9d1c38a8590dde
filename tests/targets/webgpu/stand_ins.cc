// What the stand-in headers do, written to standard output for a test to read: see
// test_wasm_stand_ins.py. Every part is its size as a u64, then its bytes.
#include <tvm/support/serializer.h>

#include <cstdio>
#include <random>

#include "src/support/arena.h"
#include "src/support/base64.h"
#include "src/support/bytes_io.h"
#include "src/support/ring_buffer.h"
#include "src/support/utils.h"

using namespace tvm;
using namespace tvm::support;

static void Part(const std::string& bytes) {
  uint64_t size = bytes.size();
  std::fwrite(&size, sizeof(size), 1, stdout);
  std::fwrite(bytes.data(), 1, size, stdout);
}

static void Check(bool ok, const char* what) {
  if (!ok) {
    std::fprintf(stderr, "wrong: %s\n", what);
    std::exit(1);
  }
}

// The bytes of a value; and it is read back from them to give them again, from fewer bytes not.
template <typename T>
static void Written(const T& value) {
  std::string bytes, again;
  BytesOutStream(&bytes).Stream::Write(value);
  T copy{};
  BytesInStream in(bytes);
  Check(in.Stream::Read(&copy), "reading back");
  char rest;
  Check(in.Read(&rest, 1) == 0, "all is read");
  BytesOutStream(&again).Stream::Write(copy);
  Check(again == bytes, "what was read back");
  std::string cut = bytes.substr(0, bytes.size() - 1);
  BytesInStream less(cut);
  Check(!less.Stream::Read(&copy), "too few bytes");
  Part(bytes);
}

enum class Kind : int32_t { kThird = 3 };

static void Values() {
  Written<int64_t>(-2);
  Written<uint16_t>(0x1234);
  Written<double>(1.5);
  Written(Kind::kThird);
  Written(DLDataType{kDLFloat, 16, 4});
  Written(DLDevice{kDLWebGPU, 7});
  Written(std::string("a\0b", 3));
  Written(ffi::String("text"));
  Written(std::vector<int64_t>{1, -1});
  Written(std::vector<std::string>{"", "xy"});
  Written(ffi::Array<ffi::String>{"p", "qr"});
  Written(std::unordered_map<std::string, std::string>{{"k", "v"}});
  Written(ffi::Map<ffi::String, ffi::String>{{"k", "v"}});
}

static void Base64() {
  std::string text, bytes("any \xff bytes\0!", 13);
  BytesOutStream out(&text);
  Base64OutStream encoder(&out);
  encoder.Write(bytes.data(), 5);
  encoder.Write(bytes.data() + 5, 8);
  encoder.Finish();
  Part(text);
  BytesInStream in(text);
  Base64InStream decoder(&in);
  decoder.InitPosition();
  std::string decoded(20, '?');
  decoded.resize(decoder.Read(decoded.data(), 20));
  Check(decoded == bytes, "base64");
}

// Random writes and reads of both kinds, against a string.
static void Queue() {
  std::minstd_rand random(1);
  RingBuffer queue;
  std::string expected;
  for (int step = 0; step < 20000; ++step) {
    std::string part(random() % 50, static_cast<char>('a' + step % 26));
    switch (random() % 4) {
      case 0:
        queue.Reserve(random() % 300);
        queue.Write(part.data(), part.size());
        expected += part;
        break;
      case 1:
        queue.WriteWithCallback(
            [&](char* to, size_t room) {
              Check(room == 100, "room");
              std::memcpy(to, part.data(), part.size());
              return part.size();
            },
            100);
        expected += part;
        break;
      case 2: {
        std::string read(std::min(part.size(), expected.size()), '?');
        queue.Read(read.data(), read.size());
        Check(read == expected.substr(0, read.size()), "bytes read");
        expected.erase(0, read.size());
        break;
      }
      default: {
        size_t half = queue.ReadWithCallback(
            [&](const char* from, size_t size) {
              Check(std::string(from, size) == expected.substr(0, size), "bytes lent");
              return size / 2;
            },
            part.size());
        expected.erase(0, half);
      }
    }
    Check(queue.bytes_available() == expected.size(), "bytes available");
  }
}

int main() {
  Values();
  Base64();
  Queue();
  Arena arena;
  int64_t* first = arena.allocate_<int64_t>(100);
  char* second = arena.allocate_<char>(1);
  first[99] = 1, *second = 2;
  Check(first[99] == 1 && reinterpret_cast<uintptr_t>(first) % alignof(int64_t) == 0, "arena");
  arena.RecycleAll();
  Check(StartsWith("abc", "ab") && !StartsWith("ab", "abc") && !StartsWith("xab", "ab"), "prefix");
}
