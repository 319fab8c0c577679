#include "cuda.h"

#include <optional>

#include "library.h"

namespace isotherm::cuda {
namespace {

// Name the driver and the compiler where they lie in no usual place; empty: they are not looked for.
constexpr const char* kDriverVariable = "ISOTHERM_CUDA";
constexpr const char* kCompilerVariable = "ISOTHERM_NVRTC";

#if defined(_WIN32)
const std::vector<std::string> kDrivers = {"nvcuda.dll"};
// Where wheels lie, seen from this library in its package, then by the loader's own search.
std::vector<std::string> compilers() {
  const std::string wheels = own_folder() + "..\\nvidia\\";
  return {wheels + "cu13\\bin\\x86_64\\nvrtc64_130_0.dll", wheels + "cuda_nvrtc\\bin\\nvrtc64_120_0.dll",
          "nvrtc64_130_0.dll", "nvrtc64_120_0.dll", "nvrtc64_112_0.dll"};
}
#elif defined(__APPLE__)
const std::vector<std::string> kDrivers = {};
std::vector<std::string> compilers() { return {}; }
#else
const std::vector<std::string> kDrivers = {"libcuda.so.1"};
std::vector<std::string> compilers() {
  const std::string wheels = own_folder() + "../nvidia/";
  return {wheels + "cu13/lib/libnvrtc.so.13",
          wheels + "cuda_nvrtc/lib/libnvrtc.so.12",
          "libnvrtc.so.13",
          "libnvrtc.so.12",
          "libnvrtc.so.11.2",
          "libnvrtc.so"};
}
#endif

#define ISOTHERM_LOAD(name, symbol, arguments) load_call(library, kWho, symbol, table.name);

std::optional<Calls> load_calls() {
  void* library = open_library(kDriverVariable, kDrivers);
  if (!library) return std::nullopt;
  constexpr const char* kWho = "CUDA's driver";
  Calls table{};
  ISOTHERM_CUDA_CALLS(ISOTHERM_LOAD)
  return table;
}

std::optional<Compiler> load_compiler() {
  void* library = open_library(kCompilerVariable, compilers());
  if (!library) return std::nullopt;
  constexpr const char* kWho = "NVRTC";
  Compiler table{};
  ISOTHERM_NVRTC_CALLS(ISOTHERM_LOAD)
  return table;
}
#undef ISOTHERM_LOAD

}  // namespace

const Calls* calls() {
  static const std::optional<Calls> table = load_calls();
  return table ? &*table : nullptr;
}

const Compiler* compiler() {
  static const std::optional<Compiler> table = load_compiler();
  return table ? &*table : nullptr;
}

}  // namespace isotherm::cuda
