// Stand-in for a header of TVM that the wheel leaves out: memory that is given back all at once.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

namespace tvm {
namespace support {

class Arena {
 public:
  template <typename T>
  T* allocate_(size_t count) {
    static_assert(alignof(T) <= alignof(std::max_align_t), "new aligns no better");
    blocks_.push_back(std::make_unique<char[]>(count * sizeof(T)));
    return reinterpret_cast<T*>(blocks_.back().get());
  }
  void RecycleAll() { blocks_.clear(); }

 private:
  std::vector<std::unique_ptr<char[]>> blocks_;
};

}  // namespace support
}  // namespace tvm
