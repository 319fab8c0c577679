// Libraries that are opened at run time, and the calls that are found there.
#pragma once
#include <string>
#include <vector>

namespace isotherm {

// The library that an environment variable names, or the first of `names` there is; null where there is none, or the
// variable is set and empty. Throws GpuError where the one that is named cannot be opened.
void* open_library(const char* variable, const std::vector<std::string>& names);

// The folder of this very library, with the separator behind it; empty where it cannot be told.
std::string own_folder();

void* find_call(void* library, const char* name);
[[noreturn]] void throw_lacking(const char* who, const char* name);

// Throws GpuError where the library, which is what `who` says, lacks it.
template <class Call>
void load_call(void* library, const char* who, const char* name, Call& call) {
  call = reinterpret_cast<Call>(find_call(library, name));
  if (!call) throw_lacking(who, name);
}

}  // namespace isotherm
