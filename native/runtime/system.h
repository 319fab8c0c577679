// What operating systems do each in their own way: memory in large pieces, processes, and where threads run. The only
// file that asks which.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace isotherm {

// Zeroed memory at the start of a page, taken from the machine as it is touched; where it is large, huge pages are
// asked for. Throws std::bad_alloc.
void* reserve_zeroed(size_t bytes);
void release(void* data, size_t bytes);

// Maps every page of [data, data + bytes) now; false where the system has no call for it, or could not.
bool populate(const void* data, size_t bytes);

// Which process this is: another one after a fork.
int process_id();

// The CPUs that this thread may run on; none where the system does not tell.
std::vector<int> allowed_cpus();

// Keeps this thread on `cpu` while it lives, if it may run there at all; a negative one changes nothing. Each walk
// makes one: nothing is allocated.
class Pinned {
 public:
  explicit Pinned(int cpu);
  ~Pinned();
  Pinned(const Pinned&) = delete;
  Pinned& operator=(const Pinned&) = delete;

 private:
  static constexpr int kMaxCpus = 1024;  // of a cpu_set_t
  uint64_t before_[kMaxCpus / 64] = {};  // a bit a CPU; all zero: not pinned
};

}  // namespace isotherm
