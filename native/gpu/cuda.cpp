#include "cuda.h"

#include "library.h"

namespace isotherm::cuda {
namespace {

// Name the driver and the compiler where they lie in no usual place; empty: they are not looked for.
constexpr const char* kDriverVariable = "ISOTHERM_CUDA";
constexpr const char* kCompilerVariable = "ISOTHERM_NVRTC";

#if defined(_WIN32)
const std::vector<std::string> kDrivers = {"nvcuda.dll"};
// By the loader's own search, and where wheels lie, seen from this library in its package.
std::vector<std::string> compilers() {
  const std::string wheels = own_folder() + "..\\nvidia\\";
  return {"nvrtc64_130_0.dll", "nvrtc64_120_0.dll", "nvrtc64_112_0.dll",
          wheels + "cu13\\bin\\x86_64\\nvrtc64_130_0.dll", wheels + "cuda_nvrtc\\bin\\nvrtc64_120_0.dll"};
}
#elif defined(__APPLE__)
const std::vector<std::string> kDrivers = {};
std::vector<std::string> compilers() { return {}; }
#else
const std::vector<std::string> kDrivers = {"libcuda.so.1"};
std::vector<std::string> compilers() {
  const std::string wheels = own_folder() + "../nvidia/";
  return {"libnvrtc.so.13",
          "libnvrtc.so.12",
          "libnvrtc.so.11.2",
          "libnvrtc.so",
          wheels + "cu13/lib/libnvrtc.so.13",
          wheels + "cuda_nvrtc/lib/libnvrtc.so.12"};
}
#endif

template <class Table, class Fill>
bool load(Table& table, const char* variable, const std::vector<std::string>& names, const Fill& fill) {
  void* library = open_library(variable, names);
  if (library) fill(library, table);
  return library != nullptr;
}

}  // namespace

const Calls* calls() {
  static Calls table{};
  static const bool is_there = load(table, kDriverVariable, kDrivers, [](void* library, Calls& to) {
#define ISOTHERM_LOAD(name, symbol, arguments) load_call(library, "CUDA's driver", symbol, to.name);
    ISOTHERM_CUDA_CALLS(ISOTHERM_LOAD)
  });
  return is_there ? &table : nullptr;
}

const Compiler* compiler() {
  static Compiler table{};
  static const bool is_there = load(table, kCompilerVariable, compilers(), [](void* library, Compiler& to) {
    ISOTHERM_NVRTC_CALLS(ISOTHERM_LOAD)
#undef ISOTHERM_LOAD
  });
  return is_there ? &table : nullptr;
}

}  // namespace isotherm::cuda
