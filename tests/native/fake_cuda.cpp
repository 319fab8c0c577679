// CUDA's driver and NVRTC in one library, whose device is the CPU: kernels are compiled by the host's compiler, and the
// lanes of a group are fibers that a barrier switches. Strict where the true ones are: a thread without a context,
// bytes out of bounds, a call that no capture allows. Memory is full of noise at first. FAKE_FAIL: see
// failing.h; FAKE_VERSION: the driver's, 13000 by default.
#include <dlfcn.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cstddef>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <regex>
#include <string>
#include <vector>

#include "failing.h"

namespace {

enum : int {
  kInvalidValue = 1,
  kOutOfMemory = 2,
  kInvalidImage = 200,
  kInvalidContext = 201,
  kNotFound = 500,
  kCaptureUnsupported = 900,
  kCompilationFailed = 6
};
constexpr size_t kStackBytes = 64 << 10;
constexpr uint64_t kDeviceBytes = 1 << 30;

struct Groups {
  unsigned x, y, z;
};

// --- the compiler ---------------------------------------------------------------------------------------------------

// What CUDA C++ has of its own, as C++.
constexpr const char* kPrelude = R"(
#include <math.h>
#include <algorithm>
#include <bit>
#include <cmath>
#include <immintrin.h>
#include <utility>
#undef INFINITY
using std::max;
using std::min;
struct Groups { unsigned x, y, z; };
struct char4 { signed char x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
Groups fake_lane, fake_group;
void (*fake_barrier)();
#define threadIdx fake_lane
#define blockIdx fake_group
#define __syncthreads fake_barrier
#define __global__
#define __launch_bounds__(...)
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __constant__ static const
#define __float_as_uint(x) std::bit_cast<unsigned>((float)(x))
#define __uint_as_float(x) std::bit_cast<float>((unsigned)(x))
#define __fmaf_rn(a, b, c) std::fma((float)(a), (float)(b), (float)(c))
static inline int atomicAdd(int* at, int value) { return std::exchange(*at, *at + value); }
static inline void dp4a(int& to, unsigned a, unsigned b, int sum) {
  for (int i = 0; i < 32; i += 8) sum += (int)(signed char)(a >> i) * (signed char)(b >> i);
  to = sum;
}
template <class... P, size_t... I>
static void call_with(void (*kernel)(P...), void** values, std::index_sequence<I...>) {
  kernel(*static_cast<P*>(values[I])...);
}
template <class... P>
static int call(void (*kernel)(P...), void** values) {
  if (values) call_with(kernel, values, std::index_sequence_for<P...>());
  return sizeof...(P);
}
)";

// The instructions of PTX that kernels use.
const std::pair<const char*, const char*> kInstructions[] = {
    {R"re(asm\("cvt\.f32\.f16 %0, %1;" : "=f"\((\w+)\) : "h"\((.*?)\)\);)re", "$1 = _cvtsh_ss($2);"},
    {R"re(asm\("cvt\.rn\.f16\.f32 %0, %1;" : "=h"\((\w+)\) : "f"\((\w+)\)\);)re", "$1 = _cvtss_sh($2, 0);"},
    {R"re(asm\("dp4a\.s32\.s32 %0, %1, %2, %3;" : "=r"\((\w+)\) : "r"\((\w+)\), "r"\((\w+)\), "r"\((\w+)\)\);)re",
     "dp4a($1, $2, $3, $4);"},
};

struct Source {
  std::string text, log, binary;
};

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

// Runs the host's compiler in the folder that FAKE_FOLDER names.
bool compile(Source& source) {
  const std::string key = std::to_string(std::hash<std::string>()(source.text));
  const std::string name = std::string(std::getenv("FAKE_FOLDER")) + "/" + key;
  std::string text = source.text;
  for (const auto& [instruction, code] : kInstructions) text = std::regex_replace(text, std::regex(instruction), code);
  const auto run = [&](const std::string& arguments) {
    const std::string command = "g++ -std=c++20 -march=native -ffp-contract=off -fno-strict-aliasing -w " + arguments;
    const bool is_good = std::system((command + " 2> " + name + ".log").c_str()) == 0;
    source.log = read_file(name + ".log");
    return is_good;
  };
  std::ofstream(name + ".cpp") << kPrelude << text;
  if (!run("-E " + name + ".cpp -o " + name + ".ii")) return false;
  const std::string whole = read_file(name + ".ii");
  const std::regex kernel(R"re(extern "C"\s+void\s+(\w+)\()re");
  std::ofstream thunks(name + ".ii", std::ios::app);
  for (std::sregex_iterator found(whole.begin(), whole.end(), kernel), end; found != end; ++found)
    thunks << "extern \"C\" int call_" << (*found)[1] << "(void** values) { return call(" << (*found)[1]
           << ", values); }\n";
  thunks.close();
  source.binary = "fake:" + name + ".so";
  return run("-O1 -shared -fPIC " + name + ".ii -o " + name + ".so");
}

// --- launches -------------------------------------------------------------------------------------------------------

struct Function {
  void* module;
  int (*call)(void**);
};

struct Launch {
  Function* function;
  Groups groups;
  unsigned lanes;
  std::vector<uint64_t> values;
};

// Contexts begin a fiber, jumps switch it from then on: they are no system calls.
struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  jmp_buf at;
  bool is_done;
};
struct Fibers {
  std::vector<Fiber> all{1024};
  Fiber* running;
  jmp_buf home;
  std::function<void()> work;
};
thread_local Fibers fibers;

void yield() {
  if (!_setjmp(fibers.running->at)) _longjmp(fibers.home, 1);
}

void begin_fiber() {
  while (true) {
    fibers.work();
    fibers.running->is_done = true;
    yield();
  }
}

// To its next barrier, or its end.
void resume(Fiber& fiber) {
  fibers.running = &fiber;
  if (_setjmp(fibers.home)) return;
  if (fiber.stack) _longjmp(fiber.at, 1);
  fiber.stack.reset(new char[kStackBytes]);
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  makecontext(&fiber.context, begin_fiber, 0);
  setcontext(&fiber.context);
}

// One group: each lane runs to its next barrier, in turn. All come to the same one.
void run_group(unsigned num_lanes, Groups& lane) {
  for (unsigned num_done = 0; num_done == 0;) {
    for (unsigned i = 0; i < num_lanes; i++) {
      Fiber& fiber = fibers.all[i];
      fiber.is_done = false;
      lane = {i, 0, 0};
      resume(fiber);
      num_done += fiber.is_done;
    }
    if (num_done != 0 && num_done != num_lanes) std::abort();  // a barrier that some lanes do not reach
  }
}

void run(const Launch& launch) {
  void* module = launch.function->module;
  auto& group = *static_cast<Groups*>(dlsym(module, "fake_group"));
  auto& lane = *static_cast<Groups*>(dlsym(module, "fake_lane"));
  *static_cast<void (**)()>(dlsym(module, "fake_barrier")) = yield;
  std::vector<void*> values;
  for (const uint64_t& value : launch.values) values.push_back(const_cast<uint64_t*>(&value));
  fibers.work = [&] { launch.function->call(values.data()); };
  for (unsigned z = 0; z < launch.groups.z; z++)
    for (unsigned y = 0; y < launch.groups.y; y++)
      for (unsigned x = 0; x < launch.groups.x; x++) {
        group = {x, y, z};
        run_group(launch.lanes, lane);
      }
}

// --- the driver -----------------------------------------------------------------------------------------------------

struct Graph {
  std::vector<Launch> launches;
};
struct Stream {
  std::unique_ptr<Graph> captured;  // while it captures
};

// A thread's contexts: who leaves one behind ends the process.
struct Entered : std::vector<void*> {
  ~Entered() {
    if (!empty()) std::abort();
  }
};
thread_local Entered entered;
int the_context, num_graph_launches, num_graphs;
std::map<uint64_t, size_t> allocated;  // bytes, by address
uint64_t allocated_bytes;

int check(const char* call, const Stream* stream = nullptr) {
  if (entered.empty() || entered.back() != &the_context) return kInvalidContext;
  if (stream && stream->captured) return kCaptureUnsupported;
  return status_of(call);
}

bool is_inside(uint64_t address, size_t bytes) {
  auto next = allocated.upper_bound(address);
  if (next == allocated.begin()) return false;
  --next;
  return address + bytes <= next->first + next->second;
}

template <class T>
T* from(uint64_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

extern "C" {

// For tests: how often a graph was launched, how many there are, and bytes that are taken.
int fake_num_graph_launches() { return num_graph_launches; }
int fake_num_graphs() { return num_graphs; }
uint64_t fake_allocated_bytes() { return allocated_bytes; }

int cuInit(unsigned) { return status_of("Init"); }
int cuDriverGetVersion(int* version) {
  const char* wanted = std::getenv("FAKE_VERSION");
  return *version = wanted ? std::atoi(wanted) : 13000, 0;
}
int cuGetErrorName(int, const char** name) { return *name = "CUDA_ERROR_FAKE", 0; }
int cuDeviceGetCount(int* count) { return *count = 1, status_of("DeviceGetCount"); }
int cuDeviceGet(int* device, int) { return *device = 0, status_of("DeviceGet"); }
int cuDeviceGetName(char* name, int room, int) {
  return std::snprintf(name, static_cast<size_t>(room), "Fake CUDA"), 0;
}
int cuDeviceTotalMem_v2(size_t* bytes, int) { return *bytes = kDeviceBytes, 0; }
int cuDeviceGetAttribute(int* value, int what, int) {
  const std::map<int, int> values = {{1, 1024}, {16, 4}, {18, 0}, {75, 9}, {76, 0}};
  return *value = values.at(what), 0;
}
int cuDevicePrimaryCtxRetain(void** context, int) {
  return *context = &the_context, status_of("DevicePrimaryCtxRetain");
}
int cuDevicePrimaryCtxRelease_v2(int) { return 0; }
int cuCtxPushCurrent_v2(void* context) {
  const int status = status_of("CtxPushCurrent");
  if (!status) entered.push_back(context);
  return status;
}
int cuCtxPopCurrent_v2(void** left) { return *left = entered.back(), entered.pop_back(), 0; }
int cuStreamCreate(Stream** stream, unsigned) { return *stream = new Stream, check("StreamCreate"); }
int cuStreamDestroy_v2(Stream* stream) { return delete stream, 0; }
int cuStreamSynchronize(Stream* stream) { return check("StreamSynchronize", stream); }
int cuStreamBeginCapture_v2(Stream* stream, int) {
  if (const int status = check("StreamBeginCapture", stream)) return status;
  stream->captured = std::make_unique<Graph>();
  return 0;
}
int cuStreamEndCapture(Stream* stream, Graph** graph) {
  *graph = stream->captured.release();
  return check("StreamEndCapture");
}
int cuGraphInstantiateWithFlags(Graph** made, Graph* graph, unsigned long long) {
  *made = new Graph(*graph);
  num_graphs++;
  return check("GraphInstantiateWithFlags");
}
int cuGraphLaunch(Graph* graph, Stream* stream) {
  if (const int status = check("GraphLaunch", stream)) return status;
  num_graph_launches++;
  for (const Launch& launch : graph->launches) run(launch);
  return 0;
}
int cuGraphDestroy(Graph* graph) { return delete graph, 0; }
int cuGraphExecDestroy(Graph* graph) { return delete graph, num_graphs--, 0; }
int cuEventCreate(void** event, unsigned) { return *event = &the_context, check("EventCreate"); }
int cuEventRecord(void*, Stream* stream) { return check("EventRecord", stream); }
int cuEventSynchronize(void*) { return check("EventSynchronize"); }
int cuEventDestroy_v2(void*) { return 0; }

int cuMemAlloc_v2(uint64_t* address, size_t bytes) {
  if (const int status = check("MemAlloc")) return status;
  if (bytes == 0) return kInvalidValue;
  if (allocated_bytes + bytes > kDeviceBytes) return kOutOfMemory;
  void* memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  std::memset(memory, 0xA5, bytes);
  *address = reinterpret_cast<uint64_t>(memory);
  allocated[*address] = bytes;
  allocated_bytes += bytes;
  return 0;
}
int cuMemFree_v2(uint64_t address) {
  if (!allocated.contains(address)) return kInvalidValue;
  allocated_bytes -= allocated[address];
  allocated.erase(address);
  std::free(from<void>(address));
  return check("MemFree");
}
int cuMemAllocHost_v2(void** memory, size_t bytes) { return *memory = std::malloc(bytes), check("MemAllocHost"); }
int cuMemFreeHost(void* memory) { return std::free(memory), 0; }
int cuMemcpyHtoDAsync_v2(uint64_t to, const void* data, size_t bytes, Stream* stream) {
  if (const int status = check("MemcpyHtoDAsync", stream)) return status;
  if (!is_inside(to, bytes)) return kInvalidValue;
  std::memcpy(from<void>(to), data, bytes);
  return 0;
}
int cuMemcpyDtoHAsync_v2(void* to, uint64_t source, size_t bytes, Stream* stream) {
  if (const int status = check("MemcpyDtoHAsync", stream)) return status;
  if (!is_inside(source, bytes)) return kInvalidValue;
  std::memcpy(to, from<void>(source), bytes);
  return 0;
}
int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t source, size_t bytes, Stream* stream) {
  if (const int status = check("MemcpyDtoDAsync", stream)) return status;
  if (!is_inside(source, bytes) || !is_inside(to, bytes)) return kInvalidValue;
  std::memcpy(from<void>(to), from<void>(source), bytes);
  return 0;
}

int cuModuleLoadData(void** module, const char* image) {
  if (const int status = check("ModuleLoadData")) return status;
  if (std::strncmp(image, "fake:", 5) != 0) return kInvalidImage;
  *module = dlopen(image + 5, RTLD_NOW | RTLD_LOCAL);
  return *module ? 0 : kInvalidImage;
}
int cuModuleGetFunction(Function** function, void* module, const char* name) {
  if (const int status = check("ModuleGetFunction")) return status;
  const auto call = reinterpret_cast<int (*)(void**)>(dlsym(module, (std::string("call_") + name).c_str()));
  *function = new Function{module, call};  // as long as the process
  return call ? 0 : kNotFound;
}
int cuModuleUnload(void*) { return 0; }
int cuLaunchKernel(Function* function, unsigned x, unsigned y, unsigned z, unsigned lanes, unsigned, unsigned, unsigned,
                   Stream* stream, void** values, void**) {
  if (const int status = check("LaunchKernel")) return status;
  if (x == 0 || y == 0 || z == 0 || y > 65535 || z > 65535 || lanes > 1024) return kInvalidValue;
  Launch launch{function, {x, y, z}, lanes, {}};
  for (int i = 0; i < function->call(nullptr); i++) {
    launch.values.push_back(0);
    std::memcpy(&launch.values.back(), values[i], sizeof(uint64_t));
  }
  if (stream->captured) {
    stream->captured->launches.push_back(std::move(launch));
  } else {
    run(launch);
  }
  return 0;
}

int nvrtcVersion(int* major, int* minor) { return *major = 13, *minor = 0, 0; }
int nvrtcCreateProgram(Source** source, const char* text, const char*, int, const char* const*, const char* const*) {
  *source = new Source{text, "", ""};
  return status_of("nvrtcCreateProgram");
}
int nvrtcCompileProgram(Source* source, int, const char* const*) {
  if (const int status = status_of("nvrtcCompileProgram")) return source->log = "line 1: no such thing", status;
  return compile(*source) ? 0 : kCompilationFailed;
}
int nvrtcGetProgramLogSize(Source* source, size_t* bytes) { return *bytes = source->log.size() + 1, 0; }
int nvrtcGetProgramLog(Source* source, char* to) {
  return std::memcpy(to, source->log.c_str(), source->log.size() + 1), 0;
}
int nvrtcGetCUBINSize(Source* source, size_t* bytes) { return *bytes = source->binary.size() + 1, 0; }
int nvrtcGetCUBIN(Source* source, char* to) {
  return std::memcpy(to, source->binary.c_str(), source->binary.size() + 1), 0;
}
int nvrtcDestroyProgram(Source** source) { return delete *source, *source = nullptr, 0; }
}
