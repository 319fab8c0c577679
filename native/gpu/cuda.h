// The part of CUDA's driver API and of NVRTC, its compiler, that is used, from NVIDIA's documentation: types, numbers,
// and tables of entry points that are filled at run time. No toolkit, nothing linked.
#pragma once
#include <cstddef>
#include <cstdint>

namespace isotherm::cuda {

using Int = int;
using Uint = unsigned int;
using Device = int;
using Address = uint64_t;  // on the device
using Context = struct ContextObject*;
using Stream = struct StreamObject*;
using Event = struct EventObject*;
using Module = struct ModuleObject*;
using Function = struct FunctionObject*;
using Graph = struct GraphObject*;
using GraphExec = struct GraphExecObject*;
using Source = struct SourceObject*;  // NVRTC's program

// clang-format off
enum : Int { kSuccess = 0, kOutOfMemory = 2, kNoDevice = 100 };
enum : Int {  // of a device
  kMaxLanes = 1, kNumUnits = 16, kIsIntegrated = 18, kMajor = 75, kMinor = 76,
};
enum : Uint { kNoTiming = 2 };           // of an event
enum : Int { kCaptureThread = 1 };       // what other threads do is not captured

// name, symbol, arguments
#define ISOTHERM_CUDA_CALLS(X)                                                                       \
  X(Init, "cuInit", (Uint))                                                                          \
  X(DriverGetVersion, "cuDriverGetVersion", (Int*))                                                  \
  X(GetErrorName, "cuGetErrorName", (Int, const char**))                                             \
  X(DeviceGetCount, "cuDeviceGetCount", (Int*))                                                      \
  X(DeviceGet, "cuDeviceGet", (Device*, Int))                                                        \
  X(DeviceGetName, "cuDeviceGetName", (char*, Int, Device))                                          \
  X(DeviceTotalMem, "cuDeviceTotalMem_v2", (size_t*, Device))                                        \
  X(DeviceGetAttribute, "cuDeviceGetAttribute", (Int*, Int, Device))                                 \
  X(PrimaryCtxRetain, "cuDevicePrimaryCtxRetain", (Context*, Device))                                \
  X(PrimaryCtxRelease, "cuDevicePrimaryCtxRelease_v2", (Device))                                     \
  X(CtxPushCurrent, "cuCtxPushCurrent_v2", (Context))                                                \
  X(CtxPopCurrent, "cuCtxPopCurrent_v2", (Context*))                                                 \
  X(StreamCreate, "cuStreamCreate", (Stream*, Uint))                                                 \
  X(StreamDestroy, "cuStreamDestroy_v2", (Stream))                                                   \
  X(StreamSynchronize, "cuStreamSynchronize", (Stream))                                              \
  X(StreamBeginCapture, "cuStreamBeginCapture_v2", (Stream, Int))                                    \
  X(StreamEndCapture, "cuStreamEndCapture", (Stream, Graph*))                                        \
  X(GraphInstantiate, "cuGraphInstantiateWithFlags", (GraphExec*, Graph, unsigned long long))        \
  X(GraphLaunch, "cuGraphLaunch", (GraphExec, Stream))                                               \
  X(GraphDestroy, "cuGraphDestroy", (Graph))                                                         \
  X(GraphExecDestroy, "cuGraphExecDestroy", (GraphExec))                                             \
  X(EventCreate, "cuEventCreate", (Event*, Uint))                                                    \
  X(EventRecord, "cuEventRecord", (Event, Stream))                                                   \
  X(EventSynchronize, "cuEventSynchronize", (Event))                                                 \
  X(EventDestroy, "cuEventDestroy_v2", (Event))                                                      \
  X(MemAlloc, "cuMemAlloc_v2", (Address*, size_t))                                                   \
  X(MemFree, "cuMemFree_v2", (Address))                                                              \
  X(MemAllocHost, "cuMemAllocHost_v2", (void**, size_t))                                             \
  X(MemFreeHost, "cuMemFreeHost", (void*))                                                           \
  X(CopyToDevice, "cuMemcpyHtoDAsync_v2", (Address, const void*, size_t, Stream))                    \
  X(CopyToHost, "cuMemcpyDtoHAsync_v2", (void*, Address, size_t, Stream))                            \
  X(CopyOnDevice, "cuMemcpyDtoDAsync_v2", (Address, Address, size_t, Stream))                        \
  X(ModuleLoadData, "cuModuleLoadData", (Module*, const void*))                                      \
  X(ModuleGetFunction, "cuModuleGetFunction", (Function*, Module, const char*))                      \
  X(ModuleUnload, "cuModuleUnload", (Module))                                                        \
  X(LaunchKernel, "cuLaunchKernel",                                                                  \
    (Function, Uint, Uint, Uint, Uint, Uint, Uint, Uint, Stream, void**, void**))

#define ISOTHERM_NVRTC_CALLS(X)                                                                      \
  X(Version, "nvrtcVersion", (Int*, Int*))                                                           \
  X(Create, "nvrtcCreateProgram",                                                                    \
    (Source*, const char*, const char*, Int, const char* const*, const char* const*))               \
  X(Compile, "nvrtcCompileProgram", (Source, Int, const char* const*))                               \
  X(GetLogSize, "nvrtcGetProgramLogSize", (Source, size_t*))                                         \
  X(GetLog, "nvrtcGetProgramLog", (Source, char*))                                                   \
  X(GetBinarySize, "nvrtcGetCUBINSize", (Source, size_t*))                                           \
  X(GetBinary, "nvrtcGetCUBIN", (Source, char*))                                                     \
  X(Destroy, "nvrtcDestroyProgram", (Source*))
// clang-format on

#define ISOTHERM_DECLARE(name, symbol, arguments) Int(*name) arguments;
struct Calls {
  ISOTHERM_CUDA_CALLS(ISOTHERM_DECLARE)
};
struct Compiler {
  ISOTHERM_NVRTC_CALLS(ISOTHERM_DECLARE)
};
#undef ISOTHERM_DECLARE

// Opened at the first call that finds them; null where they are not on this machine. Throw GpuError where they lack
// something or the driver does not start.
const Calls* calls();
const Compiler* compiler();

}  // namespace isotherm::cuda
