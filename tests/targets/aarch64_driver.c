/* Calls the functions of a shared library of TVM kernels, one request after the other.

Usage: aarch64_driver LIBRARY, with requests on stdin and replies on stdout, little endian:
  request: u32 n, n bytes of the function's name, u32 arguments, and of each
           u32 kind: 0 i64 number; 1 f64 number; 2 tensor: u32 DLPack code, u32 bits, u32 ndim,
           i64 extents[ndim], u64 n, n bytes
  reply:   u32 0, the bytes of every tensor as the function leaves them;
           or u32 n, n bytes of what went wrong
TVM's runtime functions that kernels need have stand-ins here: a parallel loop runs as TASKS tasks,
one after the other.
*/
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <tvm/ffi/c_api.h>

enum { TASKS = 3, MAX_ARGS = 32, MAX_DIMS = 8, GUARD = 64, GUARD_BYTE = 0xA5 };

typedef struct {
  void* sync_handle;
  int32_t num_task;
} ParallelEnv;
typedef int (*Lambda)(int task, ParallelEnv* env, void* data);
typedef int (*Kernel)(void* self, const TVMFFIAny* args, int32_t num_args, TVMFFIAny* result);

static char message[1024];

void TVMFFIErrorSetRaisedFromCStrParts(const char* kind, const char** parts, int32_t count) {
  (void)kind;
  for (int32_t i = 0; i < count; ++i) {
    if (parts[i]) strncat(message, parts[i], sizeof message - strlen(message) - 1);
  }
}

static int launch(Lambda lambda, void* data, int tasks) {
  ParallelEnv env = {NULL, tasks ? tasks : TASKS};
  for (int task = 0; task < env.num_task; ++task) {
    int status = lambda(task, &env, data);
    if (status) return status;
  }
  return 0;
}

static void* allocate(int device, int number, uint64_t size, int code, int bits) {
  (void)device, (void)number, (void)code, (void)bits;
  return aligned_alloc(64, (size + 63) / 64 * 64);
}

static int release(int device, int number, void* memory) {
  (void)device, (void)number;
  free(memory);
  return 0;
}

static void stop(const char* why) {
  fprintf(stderr, "aarch64_driver: %s\n", why);
  exit(1);
}

static void take(void* to, size_t size) {
  if (size && fread(to, 1, size, stdin) != size) stop("a request ends early");
}

static uint32_t take_u32(void) {
  uint32_t value;
  take(&value, sizeof value);
  return value;
}

static void provide(void* library, const char* name, void* function) {
  void** place = dlsym(library, name);
  if (place) *place = function;
}

typedef struct {
  DLTensor tensor;
  int64_t shape[MAX_DIMS];
  unsigned char* memory; /* a guard, the data, a guard */
  uint64_t size;
} Held;

static void take_tensor(Held* held) {
  memset(held, 0, sizeof *held);
  DLTensor* tensor = &held->tensor;
  tensor->dtype.code = take_u32();
  tensor->dtype.bits = take_u32();
  tensor->dtype.lanes = 1;
  tensor->ndim = take_u32();
  if (tensor->ndim > MAX_DIMS) stop("a tensor has too many dimensions");
  take(held->shape, tensor->ndim * sizeof(int64_t));
  take(&held->size, sizeof held->size);
  held->memory = aligned_alloc(64, (2 * GUARD + held->size + 63) / 64 * 64);
  memset(held->memory, GUARD_BYTE, GUARD);
  memset(held->memory + GUARD + held->size, GUARD_BYTE, GUARD);
  take(held->memory + GUARD, held->size);
  tensor->data = held->memory + GUARD;
  tensor->shape = held->shape;
  tensor->device.device_type = kDLCPU;
}

static int is_intact(const unsigned char* guard) {
  for (int i = 0; i < GUARD; ++i) {
    if (guard[i] != GUARD_BYTE) return 0;
  }
  return 1;
}

static void answer_request(void* library, uint32_t length) {
  static Held held[MAX_ARGS];
  char name[512] = "__tvm_ffi_";
  TVMFFIAny args[MAX_ARGS], result;
  uint32_t tensors = 0;
  if (length > sizeof name - 16) stop("a name is too long");
  take(name + strlen(name), length);
  uint32_t count = take_u32();
  if (count > MAX_ARGS) stop("too many arguments");
  memset(args, 0, sizeof args);
  memset(&result, 0, sizeof result);
  for (uint32_t i = 0; i < count; ++i) {
    uint32_t kind = take_u32();
    if (kind == 2) {
      take_tensor(&held[tensors]);
      args[i].type_index = kTVMFFIDLTensorPtr;
      args[i].v_ptr = &held[tensors++].tensor;
    } else {
      args[i].type_index = kind ? kTVMFFIFloat : kTVMFFIInt;
      take(&args[i].v_int64, sizeof args[i].v_int64);
    }
  }
  message[0] = 0;
  Kernel kernel = (Kernel)dlsym(library, name);
  if (!kernel) {
    snprintf(message, sizeof message, "the library has no %s", name);
  } else if (kernel(NULL, args, (int32_t)count, &result) && !message[0]) {
    snprintf(message, sizeof message, "%s failed", name);
  }
  for (uint32_t i = 0; i < tensors; ++i) {
    const unsigned char* end = held[i].memory + GUARD + held[i].size;
    if (!is_intact(held[i].memory) || !is_intact(end)) {
      snprintf(message, sizeof message, "%s wrote outside of its tensor %u", name, i);
    }
  }
  uint32_t wrong = (uint32_t)strlen(message);
  fwrite(&wrong, sizeof wrong, 1, stdout);
  fwrite(message, 1, wrong, stdout);
  for (uint32_t i = 0; i < tensors; ++i) {
    if (!wrong) fwrite(held[i].tensor.data, 1, held[i].size, stdout);
    free(held[i].memory);
  }
  fflush(stdout);
}

int main(int argc, char** argv) {
  void* library = argc == 2 ? dlopen(argv[1], RTLD_NOW) : NULL;
  if (!library) stop(argc == 2 ? dlerror() : "give a library");
  provide(library, "__TVMBackendParallelLaunch", launch);
  provide(library, "__TVMBackendAllocWorkspace", allocate);
  provide(library, "__TVMBackendFreeWorkspace", release);
  uint32_t length;
  while (fread(&length, 1, sizeof length, stdin) == sizeof length) answer_request(library, length);
  return 0;
}
