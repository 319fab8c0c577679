// An OpenCL driver that computes nothing, and fails where the environment says so:
//
//   FAKE_FAIL      see failing.h
//   FAKE_NAME      of its device
//   FAKE_LACKS=1   its device has no fused multiply-add
//   FAKE_ABORT=1   it ends the process where it is loaded
#include "failing.h"

namespace {

int32_t answer(const void* data, size_t bytes, size_t room, void* to, size_t* real) {
  if (real) *real = bytes;
  if (to && room >= bytes) std::memcpy(to, data, bytes);
  return 0;
}

int32_t text(const char* value, size_t room, void* to, size_t* real) {
  return answer(value, std::strlen(value) + 1, room, to, real);
}

[[gnu::constructor]] void loaded() {
  if (std::getenv("FAKE_ABORT")) std::abort();
}

int some_object;

}  // namespace

extern "C" {

using Word = uint32_t;
using Long = uint64_t;

int32_t clGetPlatformIDs(Word, void** platforms, Word* count) {
  if (count) *count = 1;
  if (platforms) *platforms = &some_object;
  return status_of("GetPlatformIDs");
}
int32_t clGetPlatformInfo(void*, Word, size_t room, void* to, size_t* real) { return text("Fake", room, to, real); }
int32_t clGetDeviceIDs(void*, Long, Word, void** devices, Word* count) {
  if (count) *count = 1;
  if (devices) *devices = &some_object;
  return status_of("GetDeviceIDs");
}
int32_t clGetDeviceInfo(void*, Word what, size_t room, void* to, size_t* real) {
  const Long memory = 1 << 30, local = 64 << 10, gpu = 4, config = std::getenv("FAKE_LACKS") ? 0x8F : 0xAF;
  const Word one = 1, none = 0;
  const size_t lanes = 1024;
  switch (what) {
    case 0x1000:
      return answer(&gpu, sizeof gpu, room, to, real);
    case 0x1004:
      return answer(&lanes, sizeof lanes, room, to, real);
    case 0x1010:
    case 0x101F:
      return answer(&memory, sizeof memory, room, to, real);
    case 0x101B:
      return answer(&config, sizeof config, room, to, real);
    case 0x1023:
      return answer(&local, sizeof local, room, to, real);
    case 0x1035:
      return answer(&none, sizeof none, room, to, real);
    case 0x102B:
      return text(std::getenv("FAKE_NAME") ? std::getenv("FAKE_NAME") : "Fake GPU", room, to, real);
    case 0x102C:
    case 0x102D:
    case 0x1030:
      return text("", room, to, real);
    default:
      return answer(&one, sizeof one, room, to, real);
  }
}
void* clCreateContext(const void*, Word, const void*, void*, void*, int32_t* status) {
  *status = status_of("CreateContext");
  return &some_object;
}
int32_t clReleaseContext(void*) { return 0; }
void* clCreateCommandQueue(void*, void*, Long, int32_t* status) {
  *status = status_of("CreateCommandQueue");
  return &some_object;
}
int32_t clReleaseCommandQueue(void*) { return 0; }
void* clCreateBuffer(void*, Long, size_t, void*, int32_t* status) {
  *status = status_of("CreateBuffer");
  return &some_object;
}
int32_t clReleaseMemObject(void*) { return 0; }
void* clCreateProgramWithSource(void*, Word, const char**, const size_t*, int32_t* status) {
  *status = 0;
  return &some_object;
}
void* clCreateProgramWithBinary(void*, Word, void*, const size_t*, const uint8_t**, int32_t*, int32_t* status) {
  *status = status_of("CreateProgramWithBinary");
  return &some_object;
}
int32_t clBuildProgram(void*, Word, void*, const char*, void*, void*) { return status_of("BuildProgram"); }
int32_t clGetProgramInfo(void*, Word what, size_t, void* to, size_t*) {
  if (what == 0x1165) *static_cast<size_t*>(to) = 4;
  if (what == 0x1166) std::memcpy(*static_cast<void**>(to), "fake", 4);
  return 0;
}
int32_t clGetProgramBuildInfo(void*, void*, Word, size_t room, void* to, size_t* real) {
  return text("line 1: no such thing", room, to, real);
}
int32_t clReleaseProgram(void*) { return 0; }
void* clCreateKernel(void*, const char*, int32_t* status) {
  *status = status_of("CreateKernel");
  return &some_object;
}
int32_t clSetKernelArg(void*, Word, size_t, const void*) { return status_of("SetKernelArg"); }
int32_t clReleaseKernel(void*) { return 0; }
int32_t clEnqueueNDRangeKernel(void*, void*, Word, void*, void*, void*, Word, void*, void*) {
  return status_of("EnqueueNDRangeKernel");
}
int32_t clEnqueueWriteBuffer(void*, void*, Word, size_t, size_t, const void*, Word, void*, void** event) {
  if (event) *event = &some_object;
  return status_of("EnqueueWriteBuffer");
}
int32_t clEnqueueReadBuffer(void*, void*, Word, size_t, size_t bytes, void* to, Word, void*, void*) {
  std::memset(to, 0, bytes);
  return status_of("EnqueueReadBuffer");
}
int32_t clEnqueueCopyBuffer(void*, void*, void*, size_t, size_t, size_t, Word, void*, void*) { return 0; }
int32_t clWaitForEvents(Word, void*) { return status_of("WaitForEvents"); }
int32_t clReleaseEvent(void*) { return 0; }
int32_t clFlush(void*) { return status_of("Flush"); }
int32_t clFinish(void*) { return status_of("Finish"); }
}
