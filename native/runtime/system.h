// What operating systems do each in their own way: memory in large pieces, and processes. The only file that asks
// which.
#pragma once
#include <cstddef>

namespace isotherm {

// Zeroed memory at the start of a page, taken from the machine as it is touched; where it is large, huge pages are
// asked for. Throws std::bad_alloc.
void* reserve_zeroed(size_t bytes);
void release(void* data, size_t bytes);

// Maps every page of [data, data + bytes) now; false where the system has no call for it, or could not.
bool populate(const void* data, size_t bytes);

// Which process this is: another one after a fork.
int process_id();

}  // namespace isotherm
