// WGSL kernels of a compiled library, as TVM's code generator stores them.
//
// Bytes: map name -> FunctionInfo, then map name -> WGSL. Maps, lists and strings begin with their
// length as u64. FunctionInfo: string name; list of DLDataType (u8 code, u8 bits, u16 lanes); list
// of launch tags; list of i32, unused here.
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/reflection/registry.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>

#include "gpu.h"

namespace qcc {

namespace ffi = tvm::ffi;

namespace {

class Reader {
 public:
  explicit Reader(const ffi::Bytes& bytes) : at_(bytes.data()), end_(at_ + bytes.size()) {}

  template <typename T>
  T number() {
    T value;
    std::memcpy(&value, take(sizeof(T)), sizeof(T));
    return value;
  }
  std::string string() {
    size_t size = count();
    return std::string(take(size), size);
  }
  // A length that what is left can hold.
  size_t count() {
    uint64_t value = number<uint64_t>();
    if (value > static_cast<uint64_t>(end_ - at_)) take(value);
    return value;
  }

 private:
  const char* take(uint64_t size) {
    if (size > static_cast<uint64_t>(end_ - at_)) {
      TVM_FFI_THROW(ValueError) << "the library's WGSL module is cut short";
    }
    const char* from = at_;
    at_ += size;
    return from;
  }

  const char* at_;
  const char* end_;
};

// Names outlive the modules: commands that wait for submission refer to them.
const std::string& intern(const std::string& name) {
  static auto* names = new std::unordered_set<std::string>;
  return *names->insert(name).first;
}

// One kernel: its interface, and its pipeline on each device that has run it.
class Kernel {
 public:
  Kernel(const std::string& name, Reader* info) : name_(intern(name)) {
    info->string();
    for (size_t left = info->count(); left > 0; --left) {
      auto type = info->number<DLDataType>();
      bool known = type.code == kDLInt || type.code == kDLUInt || type.code == kDLFloat ||
                   type.code == kDLOpaqueHandle;
      if (!known || type.lanes != 1) refuse("an argument of a type that WGSL has not");
      types_.push_back(type.code);
    }
    for (size_t left = info->count(); left > 0; --left) tag(info->string());
    for (size_t left = info->count(); left > 0; --left) info->number<int32_t>();
    size_t buffers = std::count(types_.begin(), types_.end(), kDLOpaqueHandle);
    if (writes_.size() != buffers) refuse("its accesses do not match its buffers");
  }

  ~Kernel() {
    auto guard = lock();
    for (auto& entry : built_) wgpuComputePipelineRelease(entry.second.first);
  }

  void code(std::string wgsl) { code_ = std::move(wgsl); }
  const std::string& code() const { return code_; }

  void operator()(const TVMFFIAny* args, int32_t count) {
    if (count != static_cast<int32_t>(types_.size() + axes_.size())) {
      refuse("called with " + std::to_string(count) + " arguments instead of " +
             std::to_string(types_.size() + axes_.size()));
    }
    auto guard = lock();
    buffers_.clear();
    words_.clear();
    for (size_t i = 0; i < types_.size(); ++i) {
      if (types_[i] == kDLOpaqueHandle) {
        buffers_.push_back(static_cast<Buffer*>(args[i].v_ptr));
      } else {
        words_.push_back(word(args[i], types_[i]));
      }
    }
    uint32_t grid[3] = {1, 1, 1};
    for (size_t i = 0; i < axes_.size(); ++i) {
      if (axes_[i] < 3) grid[axes_[i]] = static_cast<uint32_t>(args[types_.size() + i].v_int64);
    }
    words_.push_back(grid[0]);
    spread(grid);
    Gpu* gpu = device();
    auto& [pipeline, layout] = built(gpu);
    gpu->dispatch(name_, pipeline, *layout, buffers_, words_.data(), grid);
  }

 private:
  using Built = std::pair<WGPUComputePipeline, const Layout*>;

  [[noreturn]] void refuse(const std::string& reason) const {
    TVM_FFI_THROW(ValueError) << "kernel " << name_ << ": " << reason;
    TVM_FFI_UNREACHABLE();
  }

  void tag(const std::string& text) {
    static const std::string access = "paramWriteAccess:";
    auto axis = [&](const char* prefix, int first) {
      size_t size = std::strlen(prefix);
      if (text.size() != size + 1 || text.compare(0, size, prefix)) return false;
      if (text[size] < 'x' || text[size] > 'z') return false;
      axes_.push_back(first + text[size] - 'x');
      return true;
    };
    if (axis("blockIdx.", 0) || axis("threadIdx.", 3)) return;
    if (text.compare(0, access.size(), access)) refuse("an unknown launch tag " + text);
    for (char mark : text.substr(access.size())) {  // "[0,1]"
      if (mark == '0' || mark == '1') writes_.push_back(mark == '1');
    }
  }

  uint32_t word(const TVMFFIAny& value, uint8_t code) const {
    if (code == kDLFloat) {
      float number = static_cast<float>(value.v_float64);
      uint32_t bits;
      std::memcpy(&bits, &number, 4);
      return bits;
    }
    int64_t number = value.v_int64;
    bool fits = code == kDLUInt ? number >= 0 && number <= UINT32_MAX
                                : number >= INT32_MIN && number <= INT32_MAX;
    if (!fits) refuse("the argument " + std::to_string(number) + " does not fit 32 bits");
    return static_cast<uint32_t>(number);
  }

  // A grid wider than WebGPU allows goes on in z, where the shader counts on. It lets pass the one
  // workgroup whose index equals the last word, which therefore is the last index of the grid.
  void spread(uint32_t grid[3]) {
    if (grid[2] != 1) refuse("a grid with blockIdx.z, which WGSL kernels keep for themselves");
    if (grid[0] < (1u << 16)) return;
    words_.back() = grid[0] - 1;
    while (grid[0] >= (1u << 16)) {
      grid[0] = (grid[0] + 1) / 2;
      grid[2] *= 2;
    }
  }

  // The device on which all its buffers lie.
  Gpu* device() {
    if (buffers_.empty()) refuse("has no buffer");
    for (size_t i = 0; i < buffers_.size(); ++i) {
      if (!Gpu::owner(buffers_[i])) {
        refuse("argument " + std::to_string(i) + " is no living buffer of a Vulkan device");
      }
      if (!buffers_[i]->gpu->lost().empty()) refuse(buffers_[i]->gpu->lost());
      if (buffers_[i]->gpu != buffers_[0]->gpu) refuse("its buffers lie on two devices");
      for (size_t j = 0; j < i; ++j) {
        if (buffers_[i] == buffers_[j] && writes_[i] != writes_[j]) {
          refuse("buffers " + std::to_string(j) + " and " + std::to_string(i) +
                 " are one, which WebGPU cannot read and write in one dispatch");
        }
      }
    }
    return buffers_[0]->gpu;
  }

  const Built& built(Gpu* gpu) {
    auto known = built_.find(gpu);
    if (known != built_.end()) return known->second;
    const Layout& layout = gpu->layout(writes_, static_cast<uint32_t>(words_.size() * 4));
    return built_.emplace(gpu, Built{gpu->compile(name_, code_, layout), &layout}).first->second;
  }

  const std::string& name_;
  std::string code_;
  std::vector<uint8_t> types_;
  std::vector<int> axes_;  // of each launch argument: 0..2 a grid dimension, 3..5 threads
  std::vector<bool> writes_;
  std::map<Gpu*, Built> built_;
  // Of one call; under the lock.
  std::vector<Buffer*> buffers_;
  std::vector<uint32_t> words_;
};

class WgslModule final : public ffi::ModuleObj {
 public:
  explicit WgslModule(const ffi::Bytes& bytes) {
    Reader reader(bytes);
    for (size_t left = reader.count(); left > 0; --left) {
      std::string name = reader.string();
      kernels_[name] = std::make_shared<Kernel>(name, &reader);
    }
    for (size_t left = reader.count(); left > 0; --left) {
      auto kernel = kernels_.find(reader.string());
      std::string code = reader.string();
      if (kernel != kernels_.end()) kernel->second->code(std::move(code));
    }
  }

  const char* kind() const final { return "webgpu"; }
  int GetPropertyMask() const final { return ffi::Module::kRunnable; }

  ffi::Optional<ffi::Function> GetFunction(const ffi::String& name) final {
    auto found = kernels_.find(name);
    if (found == kernels_.end()) return std::nullopt;
    return ffi::Function::FromPacked(
        [kernel = found->second](ffi::PackedArgs args, ffi::Any*) {
          (*kernel)(reinterpret_cast<const TVMFFIAny*>(args.data()), args.size());
        });
  }

  ffi::String InspectSource(const ffi::String&) const final {
    std::string all;
    for (const auto& entry : kernels_) all += entry.second->code();
    return all;
  }

 private:
  std::map<std::string, std::shared_ptr<Kernel>> kernels_;
};

}  // namespace

TVM_FFI_STATIC_INIT_BLOCK() {
  tvm::ffi::reflection::GlobalDef().def("ffi.Module.load_from_bytes.webgpu",
                                        [](const ffi::Bytes& bytes) {
                                          return ffi::Module(ffi::make_object<WgslModule>(bytes));
                                        });
}

}  // namespace qcc
