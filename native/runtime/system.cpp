#include "system.h"

#include <cstdint>
#include <cstring>
#include <new>
#if defined(_WIN32)
#include <windows.h>
// after windows.h
#include <process.h>
#else
#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace isotherm {

#if defined(_WIN32)

void* reserve_zeroed(size_t bytes) {
  void* data = VirtualAlloc(nullptr, bytes, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE);
  if (!data) throw std::bad_alloc();
  return data;
}

void release(void* data, size_t) { VirtualFree(data, 0, MEM_RELEASE); }

bool populate(const void*, size_t) { return false; }

int process_id() { return _getpid(); }

#else

namespace {

#if defined(MAP_NORESERVE)
constexpr int kNoReserve = MAP_NORESERVE;
#else
constexpr int kNoReserve = 0;
#endif
[[maybe_unused]] constexpr size_t kHugePage = size_t{2} << 20;

}  // namespace

void* reserve_zeroed(size_t bytes) {
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | kNoReserve, -1, 0);
  if (data == MAP_FAILED) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  if (bytes >= kHugePage) madvise(data, bytes, MADV_HUGEPAGE);
#endif
  return data;
}

void release(void* data, size_t bytes) { munmap(data, bytes); }

bool populate([[maybe_unused]] const void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__)
  constexpr int kPopulateRead = 22;  // MADV_POPULATE_READ of Linux 5.14: older headers lack the name
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto first = reinterpret_cast<uintptr_t>(data), start = first - first % page;
  return madvise(reinterpret_cast<void*>(start), first + bytes - start, kPopulateRead) == 0;
#else
  return false;
#endif
}

int process_id() { return getpid(); }

#endif

#if defined(__linux__)

std::vector<int> allowed_cpus() {
  std::vector<int> cpus;
  cpu_set_t set;  // the call fails where the kernel knows more CPUs than it holds
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return cpus;
  for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
    if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
  return cpus;
}

Pinned::Pinned(int cpu) {
  cpu_set_t before, only;
  static_assert(sizeof(before) == sizeof(before_));
  if (cpu < 0 || sched_getaffinity(0, sizeof(before), &before) != 0 || !CPU_ISSET(cpu, &before)) return;
  CPU_ZERO(&only);
  CPU_SET(cpu, &only);
  if (sched_setaffinity(0, sizeof(only), &only) == 0) std::memcpy(before_, &before, sizeof(before));
}

Pinned::~Pinned() {
  cpu_set_t before;
  std::memcpy(&before, before_, sizeof(before));
  if (CPU_COUNT(&before) > 0) sched_setaffinity(0, sizeof(before), &before);
}

#else

std::vector<int> allowed_cpus() { return {}; }
Pinned::Pinned(int) {}
Pinned::~Pinned() = default;

#endif

}  // namespace isotherm
