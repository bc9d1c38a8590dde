// Stand-in for a header of TVM that the wheel leaves out: the layout that libtvm writes.
//
// Numbers and enums: their bytes, little endian. DLDataType: code u8, bits u8, lanes u16. DLDevice:
// type i32, id i32. Strings, lists and maps: count u64, then the elements; a map's are key, value.
#pragma once

#include <dlpack/dlpack.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/string.h>
#include <tvm/support/io.h>

#include <string>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "values lie as the processor has them");
static_assert(sizeof(DLDataType) == 4 && sizeof(DLDevice) == 8, "no padding");

namespace tvm {
namespace support {

template <typename T>
inline constexpr bool is_plain = std::is_arithmetic_v<T> || std::is_enum_v<T> ||
                                 std::is_same_v<T, DLDataType> || std::is_same_v<T, DLDevice>;

template <typename T>
struct Serializer<T, std::enable_if_t<is_plain<T>>> {
  static constexpr bool enabled = true;
  static void Write(Stream* to, const T& value) { to->Write(&value, sizeof(T)); }
  static bool Read(Stream* from, T* value) { return from->Read(value, sizeof(T)) == sizeof(T); }
};

// Shared by all that has a count: `add` reads one element and puts it into the container.
template <typename Container, typename WriteOne>
void WriteCounted(Stream* to, const Container& items, WriteOne write_one) {
  to->Write<uint64_t>(items.size());
  for (const auto& item : items) write_one(item);
}

template <typename Add>
bool ReadCounted(Stream* from, Add add) {
  uint64_t left;
  if (!from->Read(&left)) return false;
  while (left != 0 && add()) --left;
  return left == 0;
}

template <>
struct Serializer<std::string> {
  static constexpr bool enabled = true;
  static void Write(Stream* to, const std::string& text) {
    to->Write<uint64_t>(text.size());
    to->Write(text.data(), text.size());
  }
  static bool Read(Stream* from, std::string* text) {
    uint64_t size;
    if (!from->Read(&size)) return false;
    text->resize(size);
    return from->Read(text->data(), size) == size;
  }
};

template <>
struct Serializer<ffi::String> {
  static constexpr bool enabled = true;
  static void Write(Stream* to, const ffi::String& text) {
    Serializer<std::string>::Write(to, std::string(text));
  }
  static bool Read(Stream* from, ffi::String* text) {
    std::string read;
    bool ok = from->Read(&read);
    *text = ffi::String(std::move(read));
    return ok;
  }
};

template <typename List, typename T>
struct ListSerializer {
  static constexpr bool enabled = true;
  static void Write(Stream* to, const List& items) {
    WriteCounted(to, items, [to](const T& item) { to->Write(item); });
  }
  static bool Read(Stream* from, List* items) {
    *items = List();
    return ReadCounted(from, [=] {
      T item;
      if (!from->Read(&item)) return false;
      items->push_back(std::move(item));
      return true;
    });
  }
};

template <typename T>
struct Serializer<std::vector<T>> : ListSerializer<std::vector<T>, T> {};
template <typename T>
struct Serializer<ffi::Array<T>> : ListSerializer<ffi::Array<T>, T> {};

template <typename Map, typename K, typename V>
struct MapSerializer {
  static constexpr bool enabled = true;
  static void Write(Stream* to, const Map& items) {
    WriteCounted(to, items, [to](const std::pair<K, V>& item) {
      to->Write(item.first);
      to->Write(item.second);
    });
  }
  template <typename Set>
  static bool ReadWith(Stream* from, Set set) {
    return ReadCounted(from, [=] {
      K key;
      V value;
      if (!from->Read(&key) || !from->Read(&value)) return false;
      set(std::move(key), std::move(value));
      return true;
    });
  }
};

template <typename K, typename V>
struct Serializer<std::unordered_map<K, V>> : MapSerializer<std::unordered_map<K, V>, K, V> {
  static bool Read(Stream* from, std::unordered_map<K, V>* items) {
    items->clear();
    return Serializer::ReadWith(
        from, [items](K key, V value) { items->emplace(std::move(key), std::move(value)); });
  }
};

template <typename K, typename V>
struct Serializer<ffi::Map<K, V>> : MapSerializer<ffi::Map<K, V>, K, V> {
  static bool Read(Stream* from, ffi::Map<K, V>* items) {
    *items = ffi::Map<K, V>();
    return Serializer::ReadWith(
        from, [items](K key, V value) { items->Set(std::move(key), std::move(value)); });
  }
};

}  // namespace support
}  // namespace tvm
