#include "library.h"

#include <cstdlib>

#include "gpu_device.h"

#if defined(_WIN32)
#include <windows.h>
#else
#include <dlfcn.h>
#endif

namespace isotherm {
namespace {

#if defined(_WIN32)
// What an absolute path names finds its own needs beside it.
void* open_one(const std::string& name) {
  const bool is_path = name.find_first_of("/\\") != std::string::npos;
  return reinterpret_cast<void*>(LoadLibraryExA(name.c_str(), nullptr, is_path ? LOAD_WITH_ALTERED_SEARCH_PATH : 0));
}
#else
void* open_one(const std::string& name) { return dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL); }
#endif

}  // namespace

void* open_library(const char* variable, const std::vector<std::string>& names) {
  if (const char* named = std::getenv(variable)) {
    if (!*named) return nullptr;
    if (void* library = open_one(named)) return library;
    throw GpuError(GpuFault::kRefused, std::string(variable) + " names " + named + ", which cannot be opened");
  }
  for (const std::string& name : names)
    if (void* library = open_one(name)) return library;
  return nullptr;
}

void* find_call(void* library, const char* name) {
#if defined(_WIN32)
  return reinterpret_cast<void*>(GetProcAddress(reinterpret_cast<HMODULE>(library), name));
#else
  return dlsym(library, name);
#endif
}

void throw_lacking(const char* who, const char* name) {
  throw GpuError(GpuFault::kNoDriver, std::string(who) + " lacks " + name);
}

std::string own_folder() {
  std::string path;
#if defined(_WIN32)
  HMODULE self = nullptr;
  constexpr DWORD kFlags = GET_MODULE_HANDLE_EX_FLAG_FROM_ADDRESS | GET_MODULE_HANDLE_EX_FLAG_UNCHANGED_REFCOUNT;
  char name[MAX_PATH];
  if (GetModuleHandleExA(kFlags, reinterpret_cast<LPCSTR>(&own_folder), &self))
    path.assign(name, GetModuleFileNameA(self, name, MAX_PATH));
#else
  Dl_info self{};
  if (dladdr(reinterpret_cast<const void*>(&own_folder), &self) && self.dli_fname) path = self.dli_fname;
#endif
  const size_t end = path.find_last_of("/\\");
  return end == std::string::npos ? "" : path.substr(0, end + 1);
}

}  // namespace isotherm
