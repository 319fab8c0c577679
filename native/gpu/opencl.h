// The part of OpenCL 1.2 that is used, from the Khronos specification: types, numbers, and a table of entry points that
// is filled from the ICD loader at run time. No SDK, nothing linked.
#pragma once
#include <cstddef>
#include <cstdint>

namespace isotherm::cl {

using Int = int32_t;
using Uint = uint32_t;
using Ulong = uint64_t;
using Platform = struct PlatformObject*;
using Device = struct DeviceObject*;
using Context = struct ContextObject*;
using Queue = struct QueueObject*;
using Memory = struct MemoryObject*;
using Program = struct ProgramObject*;
using Kernel = struct KernelObject*;
using Event = struct EventObject*;
using OnError = void (*)(const char*, const void*, size_t, void*);
using OnBuilt = void (*)(Program, void*);

// clang-format off
enum : Int {
  kSuccess = 0, kMemoryAllocationFailure = -4, kOutOfHostMemory = -6, kInvalidBufferSize = -61,
};
enum : Ulong { kTypeCpu = 1 << 1, kTypeAll = 0xFFFFFFFF };
enum : Uint {
  kPlatformName = 0x0902,
  kDeviceType = 0x1000, kDeviceUnits = 0x1002, kDeviceMaxGroup = 0x1004, kDeviceMaxAllocation = 0x1010,
  kDeviceFloatConfig = 0x101B, kDeviceMemory = 0x101F, kDeviceLocalMemory = 0x1023, kDeviceLittleEndian = 0x1026,
  kDeviceAvailable = 0x1027, kDeviceCompiler = 0x1028, kDeviceName = 0x102B, kDeviceVendor = 0x102C,
  kDriverVersion = 0x102D, kDeviceExtensions = 0x1030, kDeviceUnifiedMemory = 0x1035,
  kProgramBinarySizes = 0x1165, kProgramBinaries = 0x1166, kProgramBuildLog = 0x1183,
};
enum : Ulong {
  kFloatDenormals = 1 << 0, kFloatInfNan = 1 << 1, kFloatRoundNearest = 1 << 2, kFloatFma = 1 << 5,
  kFloatExactDivision = 1 << 7,
};
constexpr Ulong kReadWrite = 1;
// clang-format on

// name, result, arguments
#define ISOTHERM_OPENCL_CALLS(X)                                                                                  \
  X(GetPlatformIDs, Int, (Uint, Platform*, Uint*))                                                                \
  X(GetPlatformInfo, Int, (Platform, Uint, size_t, void*, size_t*))                                               \
  X(GetDeviceIDs, Int, (Platform, Ulong, Uint, Device*, Uint*))                                                   \
  X(GetDeviceInfo, Int, (Device, Uint, size_t, void*, size_t*))                                                   \
  X(CreateContext, Context, (const intptr_t*, Uint, const Device*, OnError, void*, Int*))                         \
  X(ReleaseContext, Int, (Context))                                                                               \
  X(CreateCommandQueue, Queue, (Context, Device, Ulong, Int*))                                                    \
  X(ReleaseCommandQueue, Int, (Queue))                                                                            \
  X(CreateBuffer, Memory, (Context, Ulong, size_t, void*, Int*))                                                  \
  X(ReleaseMemObject, Int, (Memory))                                                                              \
  X(CreateProgramWithSource, Program, (Context, Uint, const char**, const size_t*, Int*))                         \
  X(CreateProgramWithBinary, Program, (Context, Uint, const Device*, const size_t*, const uint8_t**, Int*, Int*)) \
  X(BuildProgram, Int, (Program, Uint, const Device*, const char*, OnBuilt, void*))                               \
  X(GetProgramInfo, Int, (Program, Uint, size_t, void*, size_t*))                                                 \
  X(GetProgramBuildInfo, Int, (Program, Device, Uint, size_t, void*, size_t*))                                    \
  X(ReleaseProgram, Int, (Program))                                                                               \
  X(CreateKernel, Kernel, (Program, const char*, Int*))                                                           \
  X(SetKernelArg, Int, (Kernel, Uint, size_t, const void*))                                                       \
  X(ReleaseKernel, Int, (Kernel))                                                                                 \
  X(EnqueueNDRangeKernel, Int,                                                                                    \
    (Queue, Kernel, Uint, const size_t*, const size_t*, const size_t*, Uint, const Event*, Event*))               \
  X(EnqueueWriteBuffer, Int, (Queue, Memory, Uint, size_t, size_t, const void*, Uint, const Event*, Event*))      \
  X(EnqueueReadBuffer, Int, (Queue, Memory, Uint, size_t, size_t, void*, Uint, const Event*, Event*))             \
  X(EnqueueCopyBuffer, Int, (Queue, Memory, Memory, size_t, size_t, size_t, Uint, const Event*, Event*))          \
  X(WaitForEvents, Int, (Uint, const Event*))                                                                     \
  X(ReleaseEvent, Int, (Event))                                                                                   \
  X(Flush, Int, (Queue))                                                                                          \
  X(Finish, Int, (Queue))

struct Calls {
#define ISOTHERM_DECLARE(name, result, arguments) result(*name) arguments;
  ISOTHERM_OPENCL_CALLS(ISOTHERM_DECLARE)
#undef ISOTHERM_DECLARE
};

// Opens the ICD loader at its first call. Throws GpuError where there is none, or where it lacks a call.
const Calls& calls();

}  // namespace isotherm::cl
